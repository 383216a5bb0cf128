"""The whole job on a tiny checkpoint, in this process, on the session's Ray."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.cli import main
from tests.compression.local import contents
from tests.jobs.report import METRICS
from tests.models import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    np.save(folder / "tokens.npy", tiny.tokens(8, 16).numpy())
    return tiny.save(folder / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def last_report(capsys):
    """What the run printed last names: the report, and the folder that it is in."""
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("report: "))
    return json.loads(path.read_text()), path.parent


@pytest.mark.ray
def test_a_search_ends_in_a_checkpoint_within_the_budget_that_transformers_loads(source, folder, capsys, ray_session):
    assert search(source) == 0
    report, run_dir = last_report(capsys)
    assert report["job"] == "search"
    assert METRICS - set(report["metrics"]) <= {"cpu_seconds", "peak_rss_bytes"}
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
def test_a_list_of_budgets_gives_a_table_of_all_allocators(source, folder, capsys, ray_session):
    assert search(source, budget="[2.8,4]", grouping="none", errors="output") == 0
    report, run_dir = last_report(capsys)
    rows = {(row["allocator"], row["budget"]): row for row in report["pareto"]}
    assert {name for name, _ in rows} == {"uniform", "baq", "exact", "evopress"}
    for (_, budget), row in rows.items():
        assert row["bits_per_weight"] <= budget
        assert row["kl_divergence"] > 0
    assert (run_dir / "pareto.png").stat().st_size > 0
    for budget in ("2.8", "4"):
        assert (folder / "out" / budget / "config.json").exists()


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
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes, words, source, folder, capsys, ray_session):
    assert search(source, **changes) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("hasten: error: ")
    for word in words:
        assert word in message
    assert not (folder / "out").exists()
