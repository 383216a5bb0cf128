"""Chat prompts, stop strings and the end of a turn, from the command line, on the embedded models."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hasten.accel.models.checkpoint import resolve
from hasten.jobs.cli.main import main
from tests.jobs.report import last_report

TEMPLATE = (
    "{% for message in messages %}{{ '# ' + message.role + '\n' + message.content + '<|pad|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
)
CODE = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path"
RECORDS = [
    {"id": "chat", "messages": [{"role": "user", "content": CODE}, {"role": "assistant", "content": "no"}]},
    {"id": "pair", "instruction": "def read(path):", "input": "", "output": "pass"},
    {"id": "plain", "prompt": CODE},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:target"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(path):
    return {record["id"]: record for record in map(json.loads, Path(path).read_text().splitlines())}


def decode(*words, records=RECORDS):
    """Exit code of a short run on records through the template."""
    Path("chat.jinja").write_text(TEMPLATE)
    Path("prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("prompts=prompts.jsonl", "template=chat.jinja", "max_new_tokens=24", "dtype=float32", "draft_tokens=4")
    return main(["decode", *options, "drafter=prompt_lookup", *words])


@pytest.mark.ray
def test_a_run_with_stop_strings_is_the_run_without_cut_where_they_begin(folder, capsys, tokenizer, ray_session):
    assert decode("output=whole.jsonl") == 0
    report, _ = last_report(capsys)
    whole = lines("whole.jsonl")
    prompts = {key: tokenizer.decode(record["prompt_token_ids"]) for key, record in whole.items()}
    assert prompts == {
        "chat": f"# user\n{CODE}<|pad|>\n# assistant\n",
        "pair": "# user\ndef read(path):<|pad|>\n# assistant\n",
        "plain": CODE,
    }
    assert report["chat_prompts"] == 2
    assert report["stop_strings"] == []
    assert report["stop_tokens"] == [
        {"id": 0, "token": "<|endoftext|>", "from": "generation_config.json"},
        {"id": 1, "token": "<|pad|>", "from": "the chat template"},
    ]

    text = whole["plain"]["completion"]
    string = text[len(text) // 2 : len(text) // 2 + 6]
    words = f"stop_strings=[{json.dumps(string)}]"
    assert decode("output=cut.jsonl", "in_flight=3", words) == 0
    report, _ = last_report(capsys)
    assert report["stop_strings"] == [string]
    cut = lines("cut.jsonl")
    for key, record in cut.items():
        count = len(record["token_ids"])
        assert record["token_ids"] == whole[key]["token_ids"][:count]
        assert record["completion"] == whole[key]["completion"].partition(string)[0]
    assert cut["plain"]["stopped_by"] == string
    assert cut["plain"]["ended"] == "stop"

    # A run that was killed after its first result, and streams the others.
    kept = Path("cut.jsonl").read_bytes().splitlines(keepends=True)
    Path("cut.jsonl").write_bytes(kept[0])
    assert decode("output=cut.jsonl", "stream=true", words) == 0
    printed = capsys.readouterr().out
    assert {key: record["token_ids"] for key, record in lines("cut.jsonl").items()} == {
        key: record["token_ids"] for key, record in cut.items()
    }
    first = json.loads(kept[0])["id"]
    streamed = "".join(f"\n--- {key}\n{cut[key]['completion']}" for key in ("chat", "pair", "plain") if key != first)
    assert printed.startswith(streamed.removeprefix("\n"))
    assert decode("output=cut.jsonl", "stop_strings=[other]") == 2
    assert "begun with other settings (stop_strings: " in capsys.readouterr().err


@pytest.mark.ray
def test_a_stop_string_that_is_a_special_token_ends_a_completion_as_one(folder, capsys, ray_session):
    assert decode("stop_strings=['<|endoftext|>']", "ignore_eos=true", records=RECORDS[2:]) == 0
    report, _ = last_report(capsys)
    assert report["stop_tokens"] == [{"id": 0, "token": "<|endoftext|>", "from": "stop_strings"}]


WRONG = {
    "a role": ({"messages": [{"role": "robot", "content": "a"}]}, ["line 1, messages[0] has the role 'robot'"]),
    "no content": ({"messages": [{"role": "user", "text": "a"}]}, ["line 1, messages[0] has no 'content'"]),
    "only an answer": ({"messages": [{"role": "assistant", "content": "a"}]}, ["line 1 has no message before"]),
    "refused": ({"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}, ["line 1: the chat template"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_malformed_conversation_is_one_line(case, folder, capsys):
    record, words = WRONG[case]
    assert decode(records=[record]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hasten: error: prompts=prompts.jsonl, ")
    assert captured.err.count("\n") == 1
    assert [word for word in words if word not in captured.err] == [], captured.err
