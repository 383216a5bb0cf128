"""The job on a tiny checkpoint, uncompressed and compressed, in this process, on the session's Ray."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from hasten.jobs.cli.main import main
from tests.compression import local
from tests.jobs.report import METRICS, last_report
from tests.models import tiny


@pytest.fixture(scope="module")
def source(source):
    """A checkpoint, beside it the same one compressed, and token ids."""
    local.compress(local.settings(source, source.parent / "compressed"), tiny.tokens(8, 16))
    return source


def evaluate(model, **changes):
    """Exit code of a quick evaluation."""
    options = {
        "model": model,
        "evaluation.source": model.parent / "tokens.npy",
        "evaluation.sequences": 8,
        "evaluation.sequence_length": 16,
        "workers": 1,
    }
    return main(["evaluate", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_a_checkpoint_is_measured_alone_and_a_compressed_one_against_its_original(source, capsys, ray_session):
    compressed = source.parent / "compressed"
    assert evaluate(source) == 0
    alone, _ = last_report(capsys)
    assert evaluate(compressed, workers=2) == 0
    against, _ = last_report(capsys)
    for report, model in ((alone, source), (against, compressed)):
        assert {"job", "config", "metrics", "layers", "output"} <= set(report)
        assert report["job"] == "evaluate"
        assert set(report["metrics"]) >= METRICS
        assert report["output"] == str(model)
        assert report["metrics"]["tokens"] == 8 * 15
    without = {"perplexity_original", "kl_divergence", "top1_agreement"}
    assert {name for name in METRICS if alone["metrics"][name] is None} == without
    assert alone["layers"] == []
    assert alone["metrics"]["bits_per_weight"] == 16
    assert None not in [against["metrics"][name] for name in METRICS]
    assert against["config"]["original"] == str(source)
    assert against["metrics"]["perplexity_original"] == pytest.approx(alone["metrics"]["perplexity"], rel=1e-5)
    assert against["metrics"]["kl_divergence"] > 0
    assert against["metrics"]["bytes"] < against["metrics"]["bytes_original"] == alone["metrics"]["bytes"]
    assert {row["bits"] for row in against["layers"]} == {4}
    assert len(against["layers"]) == 14


def refused(folder, capsys, code):
    """The one line of a run that left nothing behind."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("hasten: error: ")
    assert captured.err.count("\n") == 1
    assert list(folder.iterdir()) == []
    return captured.err


def test_tasks_without_lm_eval_are_refused_before_any_work(source, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refused(folder, capsys, evaluate(source, tasks="[piqa]"))
    assert "tasks=['piqa'] needs packages that are not installed" in message
    assert "pip install 'lm-eval[hf]'" in message


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in that knows the task `near`; returns the models it was given."""
    models = []

    def simple_evaluate(model, tasks, **_):
        models.append(model["pretrained"])
        return {"results": {task: {"acc,none": 0.5} for task in tasks}}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": ModuleType("models"),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **named: named),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["near"])),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return models


def test_an_unknown_task_is_refused_before_any_work(source, folder, capsys, lm_eval):
    message = refused(folder, capsys, evaluate(source, tasks="[nera]"))
    assert "lm-eval has no task 'nera'; did you mean near?" in message
    assert lm_eval == []


def test_a_tasks_metrics_are_in_the_report(source, capsys, lm_eval):
    assert evaluate(source, **{"tasks": "[near]", "evaluation.sequences": 0}) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["near.acc"] == 0.5
    assert report["metrics"]["perplexity"] is None
    assert lm_eval == [str(source)]


@pytest.mark.ray
def test_a_failed_gate_ends_the_run_with_3_and_names_the_kinds_of_layers_with_the_largest_errors(
    source, capsys, ray_session
):
    compressed = source.parent / "compressed"
    assert evaluate(compressed, gate="'kl<1e-9,top1>-1'") == 2
    assert "gate=kl<1e-9,top1>-1 is wrong" in capsys.readouterr().err
    assert evaluate(compressed, gate="['kl<1e-9','top1>-1']") == 3
    report, _ = last_report(capsys)
    assert [row["passed"] for row in report["gates"]] == [False, True]
    kinds = report["gates"][0]["errors"]
    assert len(kinds) == 3
    assert list(kinds.values()) == sorted(kinds.values(), reverse=True)
    assert all(0 < error < 1 for error in kinds.values())
    assert "errors" not in report["gates"][1]
    assert evaluate(compressed, gate="['top1>-1']") == 0


def test_a_gate_that_cannot_be_judged_is_refused_before_any_work(source, folder, capsys):
    message = refused(folder, capsys, evaluate(source, gate="['kl<0.1']"))
    assert "gate=kl<0.1 compares with the original, which is not known: give original=PATH" in message
    message = refused(folder, capsys, evaluate(source, gate="['pl<9']"))
    assert "gate=pl<9 names no metric: there are kl_divergence, perplexity, top1_agreement, bytes" in message
    options = {"gate": "['perplexity<9']", "evaluation.sequences": 0}
    message = refused(folder, capsys, evaluate(source, **options))
    assert "gate=perplexity<9 needs an evaluation: give evaluation.sequences above 0" in message


def test_a_task_gate_compares_with_the_original(source, capsys, lm_eval):
    compressed = source.parent / "compressed"
    assert evaluate(compressed, **{"gate": "['task:near>-0.01']", "evaluation.sequences": 0}) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["near.acc_change"] == 0.0
    assert lm_eval == [str(compressed), str(source)]
