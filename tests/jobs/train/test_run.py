"""`hasten train` on the embedded target: what it measures and writes, and what it refuses."""

import json
import subprocess
import sys

import pytest

from hasten.accel.training.resumable import read_progress
from hasten.jobs.cli.main import main
from tests.cluster.processes import wait_for
from tests.jobs.report import last_report

QUICK = {
    "data.sequences": 24,
    "data.sequence_length": 128,
    "held_out.sequences": 4,
    "held_out.max_new_tokens": 32,
    "train.window": 128,
    "train.evaluations": 1,
    "draft_vocabulary": 512,
}


def words(**changes):
    """Command line of a quick training; options with a dot are given with two underscores."""
    options = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return ["train", *(f"{key}={value}" for key, value in options.items())]


def trained(**changes):
    """Exit code of a quick training."""
    return main(words(**changes))


@pytest.mark.slow
def test_a_trained_head_is_accepted_more_often_than_an_untrained_one(capsys):
    assert trained(train__steps=40, train__lr=3e-3) == 0
    report, run_dir = last_report(capsys)
    metrics = report["metrics"]
    assert metrics["mean_acceptance_length"] > metrics["untrained_acceptance_length"] + 0.03
    assert len(report["losses"]) == 40
    head = json.loads((run_dir / "head" / "head.json").read_text())
    assert head["acceptance"]["mean_acceptance_length"] == metrics["mean_acceptance_length"]
    assert not (run_dir / "head" / ".hasten" / "records").exists(), "they were not asked to be kept"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["draft_model", "s2d"])
def test_a_draft_model_has_all_ids_whatever_a_head_would_have(folder, capsys, head):
    assert trained(head=head, train__steps=2) == 0
    printed = capsys.readouterr().out
    assert f"to use it: drafter={head} draft=" in printed
    path = printed.splitlines()[-1].removeprefix("report: ")
    config = json.loads((folder / path).with_name("head").joinpath("config.json").read_text())
    assert config["vocab_size"] == 4096


@pytest.mark.slow
def test_a_head_that_drafts_in_the_targets_pass_is_measured_by_decoding(folder, capsys):
    assert trained(head="ppd", train__steps=30, train__lr=3e-3) == 0
    report, run_dir = last_report(capsys)
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert report["metrics"]["mean_acceptance_length"] > 1
    head = json.loads((run_dir / "head" / "head.json").read_text())
    assert len(head["rates"]) == 3, "a row for each prompt token, which size the trees"


@pytest.mark.slow
def test_acceptance_at_several_numbers_of_tokens_is_extrapolated_with_intervals(capsys):
    assert trained(train__steps=6, train__acceptance_at="[1024,1536,2048]") == 0
    report, run_dir = last_report(capsys)
    assert all((run_dir / f"{name}.png").stat().st_size > 1000 for name in ("loss", "acceptance", "data_scaling"))
    scaling = report["data_scaling"]
    assert [tokens for tokens, _ in scaling["points"]] == [1024, 1536, 2048]
    assert [row["tokens"] for row in scaling["predictions"]] == [4096, 8192, 20480]
    assert all(row["low"] <= row["value"] <= row["high"] for row in scaling["predictions"])


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_training_goes_on_with_the_same_losses(folder, capsys):
    common = {"train__steps": 30, "train__checkpoint_steps": 2, "data__records": "records"}
    assert trained(**common, output="calm") == 0
    calm = last_report(capsys)[0]
    command = words(**common, output="killed")
    process = subprocess.Popen([sys.executable, "-P", "-m", "hasten", *command], cwd=folder)
    try:
        wait_for(lambda: read_progress(folder / "killed/.hasten").step >= 4 or process.poll() is not None)
    finally:
        process.kill()
        process.wait()
    reached = read_progress(folder / "killed/.hasten").step
    assert 4 <= reached < 30, "it was killed in the middle"
    assert main(command) == 0
    resumed = last_report(capsys)[0]
    assert resumed["losses"] == calm["losses"]
    assert resumed["evaluations"] == calm["evaluations"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": "nowhere"}, "head=nowhere is no folder of a trained head"),
        ({"head": "acceptance"}, "train it with hasten train_drafter"),
        ({"data__layers": "[9]"}, "data.layers=[9] is wrong: the target has hidden states 0 to 4, and -1"),
        ({"data": "nowhere.jsonl"}, "data.source=nowhere.jsonl is wrong"),
        ({"data": "prompts.jsonl"}, "data.generate=true"),
        ({"train__batch": 3, "train__micro_batch": 2}, "micro_batch=2 must divide batch=3"),
        (
            {"train__batch": 4, "train__ranks": 3},
            "train.ranks=3 must divide train.batch=4, the windows that run at once on all ranks together",
        ),
        (
            {"train__batch": 4, "train__micro_batch": 1, "train__ranks": 2},
            "train.ranks=2 must divide train.micro_batch=1",
        ),
        ({"train__zero": 4}, "train.zero=4"),
        ({"head": "draft_model", "store": "int8"}, "store=int8 is wrong: draft_model is stored in bfloat16"),
    ],
    ids=[
        "no initial head",
        "no draft head",
        "no such state",
        "no such file",
        "no answers",
        "micro-batches",
        "batch",
        "ranks",
        "zero",
        "store",
    ],
)
def test_what_is_wrong_is_named(folder, capsys, options, message):
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "def f("}) + "\n")
    assert trained(**options) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists(), "nothing was recorded"


def test_deepspeed_is_asked_for_only_with_ranks(folder, capsys, monkeypatch):
    monkeypatch.setattr("hasten.cluster.runtime.process_group.find_spec", lambda name: None)
    assert trained(train__zero=2) == 2
    assert "train.ranks=1 with train.zero=2 needs DeepSpeed" in capsys.readouterr().err


@pytest.mark.ray
def test_more_ranks_than_cpus_are_refused_before_anything_is_recorded(folder, capsys, ray_session, monkeypatch):
    monkeypatch.setattr("hasten.cluster.runtime.process_group.find_spec", lambda name: name)
    assert trained(train__batch=8, train__ranks=8) == 2
    assert "train.ranks=8 with threads=1, on one node, need 8 CPUs each" in capsys.readouterr().err
    assert not (folder / "runs").exists()
