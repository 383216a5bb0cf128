"""`hasten train` on the embedded target: what it measures and writes, and what it refuses."""

import json

import pytest

from hasten.jobs.cli.main import main
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


def trained(**changes):
    """Exit code of a quick training; options with a dot are given with two underscores."""
    options = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return main(["train", *(f"{key}={value}" for key, value in options.items())])


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
    scaling = last_report(capsys)[0]["data_scaling"]
    assert [tokens for tokens, _ in scaling["points"]] == [1024, 1536, 2048]
    assert [row["tokens"] for row in scaling["predictions"]] == [4096, 8192, 20480]
    assert all(row["low"] <= row["value"] <= row["high"] for row in scaling["predictions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "acceptance"}, "train it with hasten train_drafter"),
        ({"data__layers": "[9]"}, "data.layers=[9] is wrong: the target has hidden states 0 to 4, and -1"),
        ({"data": "nowhere.jsonl"}, "data.source=nowhere.jsonl is wrong"),
        ({"data": "prompts.jsonl"}, "data.generate=true"),
        ({"train__batch": 3, "train__micro_batch": 2}, "micro_batch=2 must divide batch=3"),
    ],
    ids=["no draft head", "no such state", "no such file", "no answers", "micro-batches"],
)
def test_what_is_wrong_is_named(folder, capsys, options, message):
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "def f("}) + "\n")
    assert trained(**options) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists(), "nothing was recorded"
