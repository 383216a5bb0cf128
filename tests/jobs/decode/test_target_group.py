"""The job with a target that is divided over two ranks, and options that cannot work, which are refused before Ray."""

import json
import re
from pathlib import Path

import pytest
import torch

from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.models.checkpoint import resolve
from hasten.cluster.runtime import process_group
from hasten.jobs.cli.main import main
from tests.jobs.report import last_report
from tests.models import tiny

PROMPTS = dict(enumerate(tiny.tokens(3, 8).tolist()))


def decode(*words):
    return main(["decode", "drafter=prompt_lookup", "draft_tokens=4", "max_new_tokens=8", "dtype=float32", *words])


@pytest.mark.ray
def test_two_ranks_of_zero3_decode_the_tokens_of_one_process(folder, capsys, deepspeed, ray_session):
    torch.set_num_threads(1)
    whole = load_target(resolve("embedded:target"), torch.float32)
    expected = {
        int(result.id): result.token_ids
        for result in Engine(whole).decode([Request(str(key), prompt, 8) for key, prompt in PROMPTS.items()])
    }
    lines = [json.dumps({"id": key, "prompt": prompt}) for key, prompt in PROMPTS.items()]
    Path("prompts.jsonl").write_text("\n".join(lines))
    words = ["target_group.size=2", "target_group.mode=zero3", "prompts=prompts.jsonl", "output=out.jsonl"]
    assert decode(*words) == 0
    decoded = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert {record["id"]: record["token_ids"] for record in decoded} == expected
    report, _ = last_report(capsys)
    assert report["metrics"]["restarts"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target_group.size=3"], "target_group.size=3 does not divide model.layers.0.self_attn.q_proj of .* 1, 2;"),
        (["target_group.size=2", "path=llama"], "path=llama runs in one process"),
        (["target_group.size=2", "target_group.offload=cpu"], "is an option of target_group.mode=zero3"),
        (["target_group.size=0"], "target_group.size"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr(process_group, "find_spec", lambda name: True)
    monkeypatch.setattr("hasten.jobs.common.cluster.session", None)
    assert decode(*words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_deepspeed_that_is_not_installed_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(process_group, "find_spec", lambda name: None)
    assert decode("target_group.size=2") == 2
    message = r"target_group.size=2 needs DeepSpeed, .* pip install 'hasten\[distributed\]'"
    assert re.search(message, capsys.readouterr().err)
