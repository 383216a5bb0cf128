"""The job on the embedded tokenizer and on recorded ids, in this process."""

import json

import pytest
import torch

from hasten.jobs.cli.main import main
from hasten.jobs.common.prompts import save_learned
from tests.jobs.report import last_report


def replayed(**options):
    """Exit code of a quick replay of drafts by prompt lookup."""
    options = {"drafter": "prompt_lookup", "budgets": "[2,8]", "drafter.min_ngram": 2} | options
    return main(["replay", *(f"{key}={value}" for key, value in options.items())])


def record(path, *sequences):
    """A file as hasten decode writes it, of prompts and completions."""
    lines = [json.dumps({"id": 0, "prompt_token_ids": prompt, "token_ids": ids}) for prompt, ids in sequences]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_recorded_completions_are_measured_at_every_budget(folder, capsys):
    # Steps after the prompt: 2 3 1 is copied as far as the budget goes, then what comes last is given.
    loop = [1, 2, 3] * 4
    path = record(folder / "out.jsonl", (loop[:6], loop[6:]), ([1, 2], []))
    assert replayed(recorded=path) == 0
    report, run_dir = last_report(capsys)
    assert report["job"] == "replay"
    assert [row["budget"] for row in report["budgets"]] == [2, 8]
    small, large = report["budgets"]
    # Two drafted and one after them, twice; the last of all is never drafted.
    assert (small["num_spec_steps"], small["tokens_per_step"], small["drafted_per_step"]) == (2, 3, 2)
    # From six tokens, at most three stand behind an earlier pair.
    assert small["acceptance_histogram"] == [0, 0, 2]
    assert small["acceptance_per_position"] == [1, 1]
    assert large["tokens_per_step"] >= 3
    metrics = report["metrics"]
    assert metrics["tokens_per_step"] == 3
    assert metrics["num_tokens"] == 6
    assert metrics["sequences"] == 1
    assert metrics["distinct_share"] == 3 / 6
    assert metrics["distinct_trigram_share"] == 3 / 4
    assert {"acceptance_2.png", "acceptance_8.png", "report.json"} <= {path.name for path in run_dir.iterdir()}


def test_the_librarys_text_is_replayed_with_a_draft_model(capsys):
    options = {"drafter": "draft_model", "drafter.length": 2, "budgets": "[2]", "sequences": 1, "sequence_length": 24}
    options |= {"drafter.min_ngram": None, "prompt_length": 8, "dtype": "float32"}
    assert main(["replay", *(f"{key}={value}" for key, value in options.items() if value is not None)]) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["num_tokens"] == 16
    assert 1 <= report["metrics"]["tokens_per_step"] <= 3


def test_a_replay_starts_from_what_was_learned(folder, capsys):
    path = record(folder / "out.jsonl", ([1], [2, 3, 4, 5]))
    successors = torch.full((4096, 8), -1)
    successors[1:5, 0] = torch.arange(2, 6)
    drafter = {"_target_": "hasten.accel.decoding.drafters.retrieval.token_recycling.TokenRecycling"}
    save_learned(folder / "memory.safetensors", drafter, 4096, {"successors": successors})
    words = ["replay", "drafter=token_recycling", f"recorded={path}", "budgets=[8]"]
    for options, tokens in (([], 1), (["memory=memory.safetensors"], 4)):
        assert main([*words, *options]) == 0
        assert last_report(capsys)[0]["metrics"]["tokens_per_step"] == tokens


WRONG = {
    "no file": ({"recorded": "none.jsonl"}, "recorded=none.jsonl cannot be read (No such file or directory)"),
    "not a recording": ({"recorded": "prompts.jsonl"}, "recorded=prompts.jsonl, line 1 has no prompt_token_ids"),
    "foreign ids": ({"recorded": "foreign.jsonl"}, "line 2 has no prompt_token_ids and token_ids below 4096"),
    "nothing said": ({"recorded": "silent.jsonl"}, "recorded=silent.jsonl holds no completion of one token or more"),
    "no budget": ({"budgets": "[8,0]"}, "budgets=[8, 0] is wrong: expected different whole numbers, 1 or more"),
    "all prompt": (
        {"prompt_length": 256},
        "prompt_length=256 must be below sequence_length=256: the tokens after the prompt are replayed",
    ),
    "no draft model": (
        {"drafter": "draft_model", "draft": "null"},
        "drafter=DraftModel needs a draft model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_line_that_leaves_nothing_behind(case, folder, capsys):
    options, message = WRONG[case]
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    record(folder / "foreign.jsonl", ([1], [2]), ([1], [4096]))
    record(folder / "silent.jsonl", ([1], []))
    before = sorted(folder.iterdir())
    options = {"drafter": "prompt_lookup"} | options
    assert main(["replay", *(f"{key}={value}" for key, value in options.items())]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hasten: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(folder.iterdir()) == before
