"""The whole job on a tiny checkpoint, in this process, on the session's Ray."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hasten.jobs.cli.main import main
from hasten.jobs.cli.methods import method_names
from tests.compression.local import contents
from tests.jobs.report import METRICS, last_report
from tests.models import tiny


def search(source, **changes):
    """Exit code of a quick search into `out`."""
    tokens = source.parent / "tokens.npy"
    options = {
        "model": source,
        "output": "out",
        "budget": 3.2,
        "bits": "[2,3,4,5]",
        "group_sizes": "[32]",
        "workers": 1,
        "calibration.source": tokens,
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
        "search.source": tokens,
        "search.sequences": 8,
        "search.sequence_length": 16,
        "evaluation.source": tokens,
        "evaluation.sequences": 4,
        "evaluation.sequence_length": 16,
    }
    quick = {
        "allocator.generations": 3,
        "allocator.offspring": 4,
        "allocator.survivors": "[2,1]",
        "allocator.tokens": "[16,64]",
        "allocator.initial_tokens": 16,
        "allocator.initial_candidates": 4,
    }
    options |= quick if changes.get("allocator", "evopress") == "evopress" else {}
    return main(["search", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_a_search_ends_in_a_checkpoint_within_the_budget_that_transformers_loads(source, folder, capsys, ray_session):
    assert search(source) == 0
    report, run_dir = last_report(capsys)
    assert report["job"] == "search"
    assert set(report["metrics"]) >= METRICS
    assert report["metrics"]["bits_per_weight"] <= 3.2
    assert report["metrics"]["kl_divergence"] > 0
    assert (run_dir / "levels_3.2.png").stat().st_size > 0
    levels = {row["layer"]: row["level"] for row in report["layers"]}
    assert len(levels) == 14
    for block in range(2):
        assert len({levels[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert torch.isfinite(model(tiny.tokens(2, 16)).logits).all()

    # The search was finished: the same command finds it, and writes what is missing.
    before = contents(folder / "out")
    (folder / "out" / "config.json").unlink()
    assert search(source) == 0
    assert contents(folder / "out") == before


@pytest.mark.ray
def test_a_search_resumes_at_the_last_finished_generation(source, folder, caplog, ray_session):
    tried = {}
    for name, generations in (("stopped", 2), ("stopped", 4), ("whole", 4)):
        if name == "whole":
            shutil.rmtree(folder / "runs" / "levels")
        caplog.clear()
        assert search(source, **{"output": f"{name}-{generations}", "allocator.generations": generations}) == 0
        tried[name] = contents(folder / f"{name}-{generations}")
        states = (folder / "runs" / "levels").rglob("searches/*/*.json")
        assert sorted(path.stem for path in states) == [str(number) for number in range(generations + 1)]
        assert ("2 generations are finished already" in caplog.text) == (name == "stopped" and generations == 4)
    assert tried["stopped"] == tried["whole"]


@pytest.mark.ray
def test_sensitivities_are_saved_and_do_not_depend_on_the_number_of_evaluators(source, folder, ray_session):
    changes = {"allocator": "exact", "search.error_sequences": 2, "search.batch": 1}
    assert search(source, **changes) == 0
    saved = sorted(folder.rglob("searches/parts-*.json"))
    assert len(saved) >= 2
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved}
    saved[0].unlink()
    assert search(source, **changes, output="two", workers=2) == 0
    assert {path.read_bytes() for path in saved} == {content for content, _ in before.values()}
    assert [path.stat().st_mtime_ns for path in saved[1:]] == [time for path, (_, time) in before.items()][1:]


@pytest.mark.ray
def test_a_list_of_budgets_gives_a_table_of_all_allocators(source, folder, capsys, ray_session):
    # A gate that no checkpoint passes is judged at each budget.
    assert search(source, budget="[2.8,4]", grouping="none", errors="output", gate="[kl<1e-9,top1>-1]") == 3
    report, run_dir = last_report(capsys)
    judged = [(row["gate"], row["budget"], row["passed"]) for row in report["gates"]]
    assert judged == [(gate, at, gate != "kl<1e-9") for at in (2.8, 4) for gate in ("kl<1e-9", "top1>-1")]
    assert all(len(row["errors"]) == 3 for row in report["gates"] if not row["passed"])
    rows = {(row["allocator"], row["budget"]): row for row in report["pareto"]}
    assert {name for name, _ in rows} == set(method_names("allocator"))
    for (_, budget), row in rows.items():
        assert row["bits_per_weight"] <= budget
        assert row["kl_divergence"] > 0
    assert (run_dir / "pareto.png").stat().st_size > 0
    for budget in ("2.8", "4"):
        assert (folder / "out" / budget / "config.json").exists()


@pytest.mark.ray
def test_grids_zeros_and_dropped_blocks_share_one_budget(source, folder, capsys, ray_session):
    changes = {"budget": 3, "bits": "[3,4]", "sparsities": "[0.75]", "drop": "[attention,mlp,block]", "keep": "true"}
    # Too little for all layers at the lowest level: something must go.
    assert search(source, **changes, grouping="none") == 0
    report, _ = last_report(capsys)
    metrics = report["metrics"]
    assert metrics["budget_bits_per_weight"] <= 3
    rows = report["layers"]
    assert sum(row["stored_bits"] for row in rows) <= 3 * sum(row["weights"] for row in rows)
    assert "drop" in {row["level"] for row in rows}
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert torch.isfinite(model(tiny.tokens(2, 16)).logits).all()


@pytest.mark.ray
def test_a_budget_in_gigabytes_limits_the_tensors_of_the_checkpoint(source, folder, capsys, ray_session):
    original = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    budget = 0.5 * original / 1e9
    changes = {"budget": budget, "budget_unit": "gigabytes", "allocator": "exact", "keep": "true"}
    assert search(source, **changes, errors="autoquantize") == 0
    report, _ = last_report(capsys)
    tensors = [tensor for file in (folder / "out").glob("*.safetensors") for tensor in load_file(file).values()]
    shapes = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.int64)
    assert 0.45 * original < sum(tensor.nbytes for tensor in tensors) - shapes <= 1e9 * budget
    assert 0.9 * budget < report["metrics"]["budget_spent"] <= budget


@pytest.mark.ray
def test_a_budget_in_milliseconds_takes_the_levels_that_are_fast_on_the_hardware(source, folder, capsys, ray_session):
    changes = {"budget_unit": "milliseconds", "allocator": "exact", "errors": "output", "keep": "true"}
    # So slow a GPU at products that all levels take the same time: all layers stay as they are.
    slow = {"latency.tokens": 1000, "hardware.plain": 1e-6, "hardware.terabytes": 1000, "latency.other": 1.5}
    assert search(source, **changes, **slow, budget=1e9) == 2
    highest = float(re.search(r"to keep \(([\d.]+)\)", capsys.readouterr().err)[1])
    assert search(source, **changes, **slow, budget=highest) == 0
    report, _ = last_report(capsys)
    assert {row["level"] for row in report["layers"]} == set()
    assert report["metrics"]["budget_spent"] <= highest


@pytest.mark.ray
def test_whole_parts_can_be_dropped_without_any_level(source, folder, capsys, ray_session):
    changes = {"budget": 9, "bits": "[]", "keep": "true", "drop": "[block]", "allocator": "exact"}
    assert search(source, **changes) == 0
    report, _ = last_report(capsys)
    assert {row["level"] for row in report["layers"]} == {"drop"}
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "quantization_config" not in config


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 2.1}, ["budget=2.1 is below the lowest level", "w2g32"]),
        ({"budget": 9}, ["budget=9 is above the highest level", "w5g32"]),
        ({"budget": "[3,3]"}, ["budget=[3.0, 3.0] is wrong"]),
        ({"allocator.survivors": "[1]"}, ["survivors=[1] has fewer numbers than tokens=[16, 64]"]),
        ({"allocator.tokens": "[16,4096]"}, ["tokens=[16, 4096]", "the calibration has 128"]),
        ({"budget": "[3,4]", "compare": "[uniform,bak]"}, ["compare=bak is no allocator: there are baq, evopress"]),
        ({"levels": "nothing"}, ["levels=", "is no level database"]),
        ({"drop": "[atention]"}, ["drop=atention is none of attention, mlp, block"]),
        ({"drop": "[mlp]", "symmetric": "false"}, ["drop=[mlp] cannot stand next to levels with zero points (w2g32a)"]),
        ({"bits": "[]"}, ["bits=[], column_bits=[], sparsities=[], schemes=[] and extra_levels=[] leave no level"]),
        ({"sparsities": "[1.5]"}, ["sparsity=1.5 is out of range"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(changes, words, source, folder, capsys, ray_session):
    assert search(source, **changes) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("hasten: error: ")
    for word in words:
        assert word in message
    assert not (folder / "out").exists()


@pytest.mark.ray
def test_a_search_of_given_levels_reads_other_parts_of_the_text_that_they_were_calibrated_on(
    source, folder, capsys, ray_session
):
    ids = tiny.tokens(40, 16)
    np.save(folder / "users.npy", ids.numpy())
    calibration = {"calibration.sequences": 20, "calibration.sequence_length": 16}
    words = {"model": source, "output": "levels", "bits": "[2,4]", "group_sizes": "[32]", "reference": 4, "workers": 1}
    words |= calibration | {"calibration.source": "users.npy"}
    assert main(["levels", *(f"{key}={value}" for key, value in words.items())]) == 0
    levels, _ = last_report(capsys)
    changes = {"levels": "levels", "search.source": "null", "evaluation.source": "null"}
    # Without the levels' own options: the database names its text.
    assert search(source, **changes, **{"calibration.source": "library"}) == 0
    report, _ = last_report(capsys)
    texts = report["texts"]
    assert texts["calibration"] == levels["texts"]["calibration"]
    assert {text["source"] for text in texts.values()} == {str(folder / "users.npy")}
    assert [texts[role]["tenths"] for role in ("calibration", "search", "evaluation")] == [[0, 5], [5, 8], [8, 10]]
    assert main(["evaluate", "model=out", "evaluation.sequences=4", "evaluation.sequence_length=16", "workers=1"]) == 0
    again, _ = last_report(capsys)
    for key in ("original", "tokenizer"):
        assert again[key] == report[key]
    assert again["texts"]["evaluation"] == texts["evaluation"]

    assert search(source, **changes, **{"evaluation.sequences": 9, "output": "other"}) == 2
    error = capsys.readouterr().err
    assert "holds 40 sequences of 16 tokens, of which 8 are for evaluation, fewer than the 9 of 16 asked for" in error
    assert not (folder / "other").exists()


@pytest.mark.ray
def test_a_budget_includes_output_layer_and_embedding(source, folder, capsys, ray_session):
    options = {"bits": "[2,4]", "head_bits": "[4,8]", "embedding_bits": "[4,6]", "budget": 4.4, "reference": 4}
    options |= {"head_group_size": 32, "embedding_group_size": 32, "allocator.generations": 1}
    assert search(source, **options) == 0
    report, _ = last_report(capsys)
    rows = {row["layer"]: row for row in report["layers"]}
    assert len(rows) == 16
    assert rows["lm_head"]["level"] in ("w4g32", "w8g32")
    assert rows["model.embed_tokens"]["level"] in ("w4g32", "w6g32")
    metrics = report["metrics"]
    bits = sum(row["stored_bits"] for row in rows.values()) / sum(row["weights"] for row in rows.values())
    assert metrics["budget_bits_per_weight"] == metrics["bits_per_weight"] == bits <= 4.4
    inside = [row for name, row in rows.items() if "layers." in name]
    assert metrics["bits_per_weight_blocks"] == sum(row["stored_bits"] for row in inside) / sum(
        row["weights"] for row in inside
    )
    assert metrics["kl_divergence"] > 0
    assert len({row["level"] for row in inside}) > 1
