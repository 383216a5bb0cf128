"""The job on the embedded target, in this process, on the session's Ray."""

import json

import pytest

from hasten.accel.cache.prompt.speckv import SpecKV
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.cli.main import main
from hasten.jobs.common.cache_methods import parse_method
from hasten.jobs.common.prompts import with_draft
from tests.jobs.report import last_report
from tests.models import tiny


def cache(**changes):
    """Exit code of a quick run."""
    options = {
        "method": "[snapkv,kivi:bits=4]",
        "budget": "[0.25,64]",
        "tasks": "[text,repeated]",
        "context": 96,
        "new_tokens": 6,
        "sequences": 1,
        "samples": 1,
        "output": "rows",
    }
    return main(["cache", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_every_method_and_budget_is_a_row_and_finished_rows_are_kept(folder, capsys, ray_session):
    assert cache() == 0
    report, run_dir = last_report(capsys)
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    assert list(rows) == [("full", None), ("snapkv", 0.25), ("snapkv", 64), ("kivi:bits=4", None)]
    full = rows["full", None]
    assert full["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert full["top1_agreement"] == 1
    for row in rows.values():
        assert len(row["bytes_at"]) == 6
        assert 0 <= row["recall_repeated"] <= 1
    assert rows["snapkv", 0.25]["kl_divergence"] > rows["snapkv", 64]["kl_divergence"] > 0
    assert rows["kivi:bits=4", None]["bytes_end"] < full["bytes_end"]
    assert report["metrics"]["kl_divergence"] == rows["snapkv", 0.25]["kl_divergence"]
    assert (run_dir / "pareto.png").stat().st_size > 0

    files = sorted((folder / "rows").iterdir())
    assert len(files) == 4
    # A row that is there is not measured again.
    changed = json.loads(files[0].read_text()) | {"tokens_per_second": 12345.0}
    files[0].write_text(json.dumps(changed))
    assert cache() == 0
    again, _ = last_report(capsys)
    assert 12345.0 in {row["tokens_per_second"] for row in again["rows"]}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"method": "[snapvk]"}, "method=snapvk is none of"),
        ({"method": "[kivi:bits=x]"}, "bits=x is no number"),
        ({"method": "[kivi:bits]"}, "expected NAME:FIELD=VALUE"),
        ({"method": "[kivi:colour=1]"}, "method=kivi:colour=1 is wrong"),
        ({"method": "[kivi:bits=5]"}, "cache.bits=5"),
        ({"budget": "[1.5]"}, "cache_budget=1.5 is wrong"),
        ({"budget_bytes": "[64KX]"}, "budget_bytes=64KX is wrong"),
        ({"method": "[double_sparsity]", "budget_bytes": "[64KiB]"}, "cache=DoubleSparsity holds all tokens"),
        ({"tasks": "[txt]"}, "tasks=txt is none of text"),
        ({"context": 100000}, "context=100000 is too long"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(folder, capsys, changes, wrong):
    assert cache(**changes) == 2
    assert wrong in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_hyper_parameters_stand_behind_the_name():
    assert parse_method("kivi:bits=4,residual=8") == KIVI(bits=4, residual=8)
    with pytest.raises(UserError, match="is none of"):
        parse_method("")


def test_the_text_of_a_hyper_parameter_is_taken_as_it_is():
    assert parse_method("speckv:draft=embedded:draft,window=8") == SpecKV(draft="embedded:draft", window=8)
    assert parse_method("speckv:draft=null") == SpecKV()


def test_a_draft_model_of_another_tokenizer_is_refused(tmp_path):
    draft = tiny.save(tmp_path / "draft", "llama")
    with pytest.raises(UserError, match="give a draft model with the target's tokenizer"):
        with_draft(SpecKV(draft=str(draft)), resolve("embedded:target"))
    with pytest.raises(UserError, match=r"cache\.draft="):
        with_draft(SpecKV(draft=str(tmp_path / "none")), resolve("embedded:target"))
    made = with_draft(SpecKV(draft="embedded:draft"), resolve("embedded:target"))
    assert made.draft == str(resolve("embedded:draft").absolute())
