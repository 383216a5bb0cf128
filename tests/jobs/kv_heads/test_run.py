"""The job on a tiny checkpoint, in this process, with its tasks in turn."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.cluster.programs import cache_calibration
from hasten.jobs.cli.main import main
from hasten.jobs.kv_heads import run as job
from tests.compression.local import contents
from tests.jobs.report import last_report


@pytest.fixture
def tasks(monkeypatch):
    """The parts that were computed; after the second one the run is killed."""
    computed = []

    def in_turn(function, arguments, count, at_once, needs, batches):
        for number in range(count):
            if len(computed) == 2:
                computed.append("killed")
                raise KeyboardInterrupt
            computed.append(number)
            yield number, function(*arguments(number))

    monkeypatch.setattr(cache_calibration, "task_results", in_turn)
    monkeypatch.setattr(job, "cluster_session", lambda *_: nullcontext())
    return computed


def kv_heads(source, **changes):
    options = {
        "model": source,
        "source": source.with_name("tokens.npy"),
        "sequences": 3,
        "sequence_length": 16,
        "shards": 3,
        "output": "out",
    }
    return main(["kv_heads", *(f"{key}={value}" for key, value in (options | changes).items())])


def test_a_killed_run_goes_on_and_transformers_loads_half_of_the_heads(source, folder, tasks, capsys):
    assert kv_heads(source) != 0
    assert not (folder / "out" / "config.json").exists()
    assert kv_heads(source) == 0
    assert tasks == [0, 1, "killed", 0]
    report, _ = last_report(capsys)
    assert report["heads"] == 1
    assert report["original"]["path"] == str(source)
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.num_key_value_heads == 1
    assert model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values.layers[0].keys.shape == (1, 1, 3, 16)
    # A block that is missing is written again, and nothing else.
    whole = contents(folder / "out")
    for file in ("config.json", "model-00002-of-00003.safetensors"):
        (folder / "out" / file).unlink()
    assert kv_heads(source) == 0
    assert contents(folder / "out") == whole
    assert kv_heads(source, keys="mean") == 2
    assert "was begun with other settings (keys: directions, now mean)" in capsys.readouterr().err
    assert kv_heads(source, group=4) == 2
    assert "group=4 does not divide the 2 KV heads" in capsys.readouterr().err
