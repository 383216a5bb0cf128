"""The job on a tiny checkpoint, whose prompts are token ids, in this process, on the session's Ray."""

import json
import shutil
from pathlib import Path

import pytest

from hasten.accel.decoding.lengths.adaptive import Adaptive
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.main import main
from hasten.jobs.decode.draft_length import chosen_draft_length
from hasten.jobs.decode.options import DecodeConfig
from tests.jobs.report import last_report
from tests.models import tiny

PROMPTS = {f"p{number}": row for number, row in enumerate(tiny.tokens(5, 8).tolist())}
METRICS = {
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "num_spec_steps",
    "tokens_per_second",
    "target_efficiency",
    "draft_share",
    "target_share",
    "verify_share",
    "distinct_share",
    "seconds",
    "cpu_seconds",
    "peak_rss_bytes",
}


def lines(path):
    """Objects of a JSON Lines file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, prompts):
    """A file of prompts by id."""
    path.write_text("".join(json.dumps({"id": key, "prompt": prompt}) + "\n" for key, prompt in prompts.items()))
    return path


def decode(source, **changes):
    """Exit code of a quick run with drafts by prompt lookup."""
    options = {
        "target": source,
        "drafter": "prompt_lookup",
        "prompts": "prompts.jsonl",
        "output": "out.jsonl",
        "max_new_tokens": 12,
        "draft_tokens": 4,
        "dtype": "float32",
    }
    return main(["decode", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_a_compressed_cache_gives_the_same_tokens_with_and_without_drafts(source, folder, capsys, ray_session):
    write(folder / "prompts.jsonl", dict(list(PROMPTS.items())[:3]))
    cache = {"cache": "snapkv", "cache_budget": 4, "cache.window": 2, "cache.recent": 1, "cache.sinks": 1}
    found = {}
    for drafts in (0, 4):
        assert decode(source, **cache, draft_tokens=drafts, output=f"out{drafts}.jsonl") == 0
        report, _ = last_report(capsys)
        assert report["config"]["cache"]["_target_"].endswith("SnapKV")
        found[drafts] = {record["id"]: record["token_ids"] for record in lines(f"out{drafts}.jsonl")}
    assert found[0] == found[4]
    # Another cache is another setting: results of the full one are not taken over.
    assert decode(source, draft_tokens=0, output="out0.jsonl") == 2
    assert "out0.jsonl" in capsys.readouterr().err


@pytest.mark.ray
def test_caches_that_read_prompts_get_contexts_and_a_draft_model(source, folder, capsys, ray_session):
    question = PROMPTS["p0"]
    record = {"prompt": question, "contexts": [[5, 6, 7], [8, 9]], "prefix": [4]}
    (folder / "prompts.jsonl").write_text(json.dumps(record))
    assert decode(source, cache="ape") == 0
    (result,) = lines("out.jsonl")
    assert result["prompt_token_ids"] == [4, 5, 6, 7, 8, 9, *question]
    draft = {"cache.draft": source, "cache.window": 1, "cache.sinks": 1, "cache.recent": 1, "cache.kernel": 1}
    assert decode(source, cache="speckv", cache_budget=4, **draft, output="kv.jsonl") == 0
    (result,) = lines("kv.jsonl")
    assert result["prompt_token_ids"] == question
    assert len(result["token_ids"]) == 12


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"cache": "ape"}, "line 1 has no list of 'contexts'"),
        ({"cache": "ape", "prompts": "null"}, "reads contexts beside the prompt"),
        ({"cache": "speckv", "cache_budget": 4, "cache.draft": "nowhere"}, "cache.draft='nowhere' does not exist"),
    ],
)
def test_caches_that_read_prompts_refuse_what_they_cannot_read(source, folder, capsys, changes, wrong):
    write(folder / "prompts.jsonl", PROMPTS)
    assert decode(source, **changes) == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.ray
def test_every_prompt_gets_a_result_and_a_second_run_adds_the_missing_ones(source, folder, capsys, ray_session):
    write(folder / "prompts.jsonl", dict(list(PROMPTS.items())[:3]))
    assert decode(source) == 0
    report, run_dir = last_report(capsys)
    first = {record["id"]: record for record in lines("out.jsonl")}
    assert {key: record["prompt_token_ids"] for key, record in first.items()} == dict(list(PROMPTS.items())[:3])
    for record in first.values():
        assert record["completion"] is None, "there is no tokenizer"
        assert len(record["token_ids"]) == record["figures"]["num_tokens"] == 12
        assert record["ended"] == "length"
    metrics = report["metrics"]
    assert set(metrics) >= METRICS
    assert metrics["num_tokens"] == 36
    assert metrics["mean_acceptance_length"] == pytest.approx(36 / metrics["num_spec_steps"])
    assert sum(report["acceptance_histogram"]) == metrics["num_spec_steps"]
    assert len(report["acceptance_per_position"]) == len(report["acceptance_histogram"]) - 1
    assert {row["id"] for row in report["prompts"]} == set(first)
    assert report["output"] == "out.jsonl"
    assert {"acceptance.png", "time.png", "config.yaml", "hasten.log"} <= {path.name for path in run_dir.iterdir()}

    # As a run leaves it that was killed: a result is missing, and another was cut off in the middle.
    before = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(before[0] + before[1] + before[2][:40])
    write(folder / "prompts.jsonl", PROMPTS)
    assert decode(source) == 0
    again, _ = last_report(capsys)
    found = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    assert found[:2] == before[:2]
    second = {record["id"]: record for record in lines("out.jsonl")}
    assert len(found) == len(second) == 5
    assert {key: second[key]["token_ids"] for key in first} == {key: first[key]["token_ids"] for key in first}
    assert (again["metrics"]["prompts"], again["metrics"]["prompts_kept"]) == (5, 2)
    assert again["metrics"]["num_tokens"] == 60
    assert sum(again["acceptance_histogram"]) == sum(record["figures"]["num_spec_steps"] for record in second.values())

    # Nothing is missing: no actor starts, and the figures are the same.
    assert decode(source) == 0
    last, _ = last_report(capsys)
    assert last["metrics"]["tokens_per_second"] is None
    assert last["acceptance_histogram"] == again["acceptance_histogram"]

    assert decode(source, max_new_tokens=13) == 2
    assert "out.jsonl was begun with other settings (max_new_tokens: 12, now 13): " in capsys.readouterr().err
    write(folder / "prompts.jsonl", PROMPTS | {"p0": PROMPTS["p1"]})
    assert decode(source) == 2
    assert "has a result of another prompt with the id 'p0'" in capsys.readouterr().err


@pytest.mark.ray
def test_learned_state_is_saved_and_sampled_tokens_depend_on_seed_and_id_alone(source, folder, capsys, ray_session):
    write(folder / "prompts.jsonl", PROMPTS)
    options = {"drafter": "token_recycling", "temperature": 1.0, "memory": "memory.safetensors"}
    assert decode(source, **options) == 0
    cold, _ = last_report(capsys)
    assert decode(source, **options, output="warm.jsonl", in_flight=1) == 0
    warm, _ = last_report(capsys)
    assert warm["metrics"]["num_draft_tokens"] > cold["metrics"]["num_draft_tokens"]
    assert decode(source, draft_tokens=0, temperature=1.0, output="plain.jsonl", stream="true") == 0
    printed = capsys.readouterr().out.splitlines()
    found = [{record["id"]: record["token_ids"] for record in lines(name)} for name in ("out.jsonl", "warm.jsonl")]
    plain = {record["id"]: record["token_ids"] for record in lines("plain.jsonl")}
    assert found == [plain, plain]
    assert len({tuple(ids) for ids in plain.values()}) == 5
    assert printed[10] == "completions: plain.jsonl"
    assert printed[:2] == ["--- p0", " ".join(map(str, plain["p0"])) + " "]
    assert decode(source, memory="memory.safetensors", output="other.jsonl") == 2
    assert "memory.safetensors was learned by TokenRecycling, and the drafter is Prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Adaptive()),
        (["draft_length.explore_every=8"], Adaptive(explore_every=8)),
        (["draft_length=fixed", "draft_length.tokens=4"], Fixed(4)),
        (["draft_tokens=6"], Fixed(6)),
        (["draft_length=fixed", "draft_tokens=0"], Fixed(0)),
    ],
)
def test_draft_tokens_is_short_for_a_fixed_length_and_wins(words, expected):
    assert chosen_draft_length(compose("decode", DecodeConfig, words)) == expected


@pytest.fixture
def other(folder):
    """The embedded draft model with another tokenizer: two entries changed places, one is gone."""
    path = folder / "other"
    shutil.copytree(resolve("embedded:draft"), path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["def"], vocabulary["class"] = vocabulary["class"], vocabulary["def"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


CHAT = '{"id": 2, "messages": [{"role": "user", "content": "import"}]}\n'
GOOD = '{"id": 1, "prompt": "import os"}\n'
WRONG = {
    "no file": (None, {}, ["prompts=prompts.jsonl cannot be read", "No such file"]),
    "an empty file": ("\n\n", {}, ["prompts=prompts.jsonl is empty", "JSON Lines"]),
    "no JSON": (GOOD + "\nimport os\n", {}, ["prompts=prompts.jsonl, line 3 is not JSON"]),
    "no object": (GOOD + "[1]\n", {}, ["line 2 is JSON, but no object"]),
    "no prompt": (
        '{"title": "why"}\n',
        {},
        ["line 1 has no 'prompt' (or messages, ", "only title", "prompt_field=NAME"],
    ),
    "no text": ('{"prompt": 3}\n', {}, ["line 1 has a 'prompt' that is neither text nor a list of token ids"]),
    "no template": (
        GOOD + CHAT,
        {},
        ["line 2 holds messages, and the tokenizer has no chat template", "template=PATH"],
    ),
    "no such template": (GOOD, {"template": "none.jinja"}, ["template=none.jinja cannot be read", "No such file"]),
    "an empty stop string": (GOOD, {"stop_strings": "['']"}, ["stop_strings holds ''", "one character or more"]),
    "empty": (GOOD + '{"prompt": ""}\n', {}, ["line 2 has an empty 'prompt'", "one token"]),
    "foreign id": ('{"prompt": [5, 4096]}\n', {}, ["line 1 holds token id 4096", "(0 to 4095)"]),
    "an id twice": (GOOD + '{"prompt": "a"}\n' + GOOD, {}, ["has the id '1' twice, in lines 1 and 3"]),
    "too long": (
        json.dumps({"prompt": [5] * 2000}) + "\n",
        {"max_new_tokens": "49"},
        ["line 1: the prompt '1' has 2000 tokens", "max_new_tokens=49", "context of 2048"],
    ),
    "temperature": (GOOD, {"temperature": "-1"}, ["temperature=-1", "0 or more"]),
    "an infinite temperature": (GOOD, {"temperature": "inf"}, ["temperature=inf is wrong", "a finite number"]),
    "no temperature": (GOOD, {"temperature": "nan"}, ["temperature=nan is wrong", "0 or more"]),
    "top_p": (GOOD, {"top_p": "0"}, ["top_p=0.0 is wrong", "above 0 and at most 1"]),
    "penalty": (GOOD, {"repetition_penalty": "0"}, ["repetition_penalty=0.0 is wrong", "above 0"]),
    "a negative length": (
        GOOD,
        {"draft_length": "fixed", "draft_length.tokens": "-1"},
        ["tokens=-1 is wrong", "expected 0 or more"],
    ),
    "two budgets of the cache": (
        GOOD,
        {"cache": "snapkv", "cache_budget": "64", "cache_budget_bytes": "64KiB"},
        ["cache_budget=64 and cache_budget_bytes=64KiB are two budgets"],
    ),
    "a budget of the full cache": (GOOD, {"cache_budget_bytes": "64KiB"}, ["cache_budget_bytes=65536 needs a method"]),
    "no assignment": (GOOD, {"cache": "mixed", "cache.assignment": "nowhere"}, ["cache.assignment=nowhere cannot be"]),
    "no such length": (GOOD, {"draft_length": "fixd"}, ["draft_length=fixd is wrong", "did you mean fixed?"]),
    "a stop outside": (GOOD, {"stop": "[4096]"}, ["stop=[4096] holds 4096", "(0 to 4095)"]),
    "trees for a chain's verifier": (
        GOOD,
        {"drafter": "token_recycling", "verifier": "speculative_sampling", "temperature": "1"},
        ["verifier=speculative_sampling takes chains only"],
    ),
    "drawn drafts that are shared": (
        GOOD,
        {"temperature": "1", "drafter": "draft_model", "verifier": "speculative_sampling", "placement": "shared"},
        ["placement=shared does not work with verifier=SpeculativeSampling", "placement=private"],
    ),
    "no draft model": (GOOD, {"drafter": "draft_model", "draft": "null"}, ["drafter=DraftModel needs", "draft=PATH"]),
    "no such target": (GOOD, {"target": "nowhere"}, ["target='nowhere' does not exist", "a checkpoint folder"]),
    "no such draft": (GOOD, {"drafter": "draft_model", "draft": "nowhere"}, ["draft='nowhere' does not exist"]),
    "another tokenizer": (
        GOOD,
        {"drafter": "draft_model", "draft": "other"},
        ["different tokenizers: 4096 and 4096 entries, 2 with another id", "'class'", "in target", "in draft"],
    ),
    "output of somebody else": (GOOD, {"output": "prompts.jsonl"}, ["output=prompts.jsonl holds something else"]),
    "output is a folder": (GOOD, {"output": "other"}, ["output=other is no file"]),
    "no memory": (
        GOOD,
        {"memory": "prompts.jsonl"},
        ["memory=prompts.jsonl cannot be read as a drafter's learned state"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_that_leaves_nothing_behind(case, folder, other, capsys):
    text, options, words = WRONG[case]
    if text is not None:
        (folder / "prompts.jsonl").write_text(text)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    options = {"prompts": "prompts.jsonl", "drafter": "prompt_lookup"} | options
    assert main(["decode", *(f"{key}={value}" for key, value in options.items())]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hasten: error: ")
    assert captured.err.count("\n") == 1
    assert [word for word in words if word not in captured.err] == [], captured.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_text_for_a_target_without_a_tokenizer_is_refused(source, folder, capsys):
    (folder / "prompts.jsonl").write_text(GOOD)
    assert decode(source) == 2
    assert "line 1 is text, and the target's folder has no tokenizer: give lists of" in capsys.readouterr().err
    assert decode(source, prompts="null") == 2
    assert "prompts=null is text" in capsys.readouterr().err


def test_a_vocabulary_of_another_size_is_refused(source, folder, capsys):
    write(folder / "prompts.jsonl", PROMPTS)
    assert decode(source, drafter="draft_model", draft="embedded:draft") == 2
    err = capsys.readouterr().err
    assert f"has a vocabulary of {tiny.VOCABULARY} and draft=" in err
    assert "one of 4096" in err
