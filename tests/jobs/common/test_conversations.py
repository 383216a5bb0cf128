"""Conversations as text in every job that reads text, from the command line."""

import json
from pathlib import Path

import pytest

from hasten.jobs.cli.main import main

SOURCES = [
    ("compress", "calibration.source"),
    ("compress", "evaluation.source"),
    ("levels", "calibration.source"),
    ("search", "calibration.source"),
    ("search", "search.source"),
    ("search", "evaluation.source"),
    ("evaluate", "evaluation.source"),
    ("train_drafter", "text.source"),
    ("replay", "text"),
]
# The job's other texts are short: they are read first.
CALIBRATION = ["calibration.sequences=2", "calibration.sequence_length=16"]
SHORT = {
    "compress": CALIBRATION,
    "levels": CALIBRATION,
    "search": [*CALIBRATION, "search.sequences=1", "search.sequence_length=16"],
}


def refused(capsys, *words):
    """The error of a job that ends before it writes anything."""
    before = sorted(Path().rglob("*"))
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return captured.err


@pytest.mark.parametrize(("job", "source"), SOURCES)
def test_conversations_need_a_template_and_pass_through_it(job, source, folder, capsys):
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    Path("chat.jsonl").write_text('{"text": "a"}\n' + json.dumps(record) + "\n")
    error = refused(capsys, job, f"{source}=chat.jsonl", *SHORT.get(job, []))
    assert "chat.jsonl line 2 holds messages, and the tokenizer has no chat template: give template=PATH" in error
    Path("chat.jinja").write_text("{{ raise_exception('seen: ' + messages[1].content) }}")
    error = refused(capsys, job, f"{source}=chat.jsonl", "template=chat.jinja", *SHORT.get(job, []))
    assert "chat.jsonl line 2: the chat template refuses the messages: seen: y" in error
