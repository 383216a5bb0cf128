import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from hasten.accel.compression.calibration.settings import PROPAGATE, Task
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.cluster.actors.calibrator import Calibrator, _Packed
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.jobs.cli.main import main
from tests.compression import local
from tests.models import tiny

TOKENS = tiny.tokens(batch=9)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama") / "m", "llama", dtype=torch.bfloat16, num_hidden_layers=4)


def run(settings, workers, tokens=TOKENS, progress=None):
    compression = CalibrationPass(settings, tokens, workers)
    fingerprint = settings.fingerprint(compression.task.checkpoint, tokens)
    compression.task.output.open(fingerprint, overwrite=False)
    return compression.run(progress)


def calibrators():
    """Processes of this test's calibrators."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if any("Calibrator" in word for word in process.cmdline()[:1])]


@pytest.mark.ray
@pytest.mark.parametrize("propagate", PROPAGATE)
def test_any_number_of_calibrators_gives_the_bytes_of_one_process(propagate, source, tmp_path, ray_session):
    local.compress(local.settings(source, tmp_path / "alone", propagate=propagate), TOKENS)
    report = run(local.settings(source, tmp_path / "three", propagate=propagate), 3)
    assert [row["block"] for row in report.blocks] == [0, 1, 2, 3]
    assert local.contents(tmp_path / "three") == local.contents(tmp_path / "alone")


@pytest.mark.ray
@pytest.mark.parametrize("propagate", ["sequential", "quantized"])
def test_experts_that_are_read_when_they_run_give_the_bytes_of_one_process(propagate, tmp_path, ray_session):
    mixture = tiny.save(tmp_path / "m", "mixtral", dtype=torch.bfloat16)
    local.compress(local.settings(mixture, tmp_path / "alone", propagate=propagate), TOKENS)
    run(local.settings(mixture, tmp_path / "two", propagate=propagate), 2)
    assert local.contents(tmp_path / "two") == local.contents(tmp_path / "alone")


@pytest.mark.ray
def test_packed_layers_are_fetched_when_one_is_read_and_one_stage_is_held(ray_session, monkeypatch):
    import ray

    stages = [{f"{name}{number}": {"weight": torch.full((2,), number)} for name in "ab"} for number in range(2)]
    references, fetched, get = [ray.put(stage) for stage in stages], [], ray.get
    monkeypatch.setattr(ray, "get", lambda reference: fetched.append(reference) or get(reference))
    held = {}
    first, second = (_Packed(reference, held) for reference in references)
    assert fetched == []
    read = [packed[name] for packed, name in ((first, "a0"), (first, "b0"), (second, "a1"))]
    assert [int(parts["weight"][0]) for parts in read] == [0, 0, 1]
    assert fetched == references
    assert list(held) == references[1:]
    assert second.get("c1") is None
    assert set(first) == set(stages[0])


@pytest.mark.ray
@pytest.mark.parametrize("propagate", ["sequential", "original"])
def test_killed_calibrators_are_replaced_and_the_bytes_are_the_same(propagate, source, tmp_path, ray_session):
    local.compress(local.settings(source, tmp_path / "alone", propagate=propagate), TOKENS)
    killed = []

    def kill(count, row):
        if count == 2:
            victim = calibrators()[0]
            killed.append(victim.pid)
            victim.send_signal(signal.SIGKILL)

    report = run(local.settings(source, tmp_path / "out", propagate=propagate), 2, progress=kill)
    assert report.restarts == len(killed) == 1
    assert local.contents(tmp_path / "out") == local.contents(tmp_path / "alone")


@pytest.mark.ray
@pytest.mark.parametrize(("propagate", "missing"), [("sequential", [2, 3]), ("original", [0, 3])])
def test_finished_blocks_are_kept_and_only_the_others_done(propagate, missing, source, tmp_path, ray_session):
    chosen = local.settings(source, tmp_path / "out", propagate=propagate)
    local.compress(chosen, TOKENS)
    whole = local.contents(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))[-4:]
    for block in missing:
        shards[block].unlink()
    report = run(chosen, 1)
    assert report.resumed == 2
    assert [row["block"] for row in report.blocks] == missing
    assert local.contents(tmp_path / "out") == whole


@pytest.mark.ray
def test_a_quantizer_without_statistics_needs_no_tokens(source, tmp_path, ray_session):
    report = run(local.settings(source, tmp_path / "out", RoundToNearest()), 1, tokens=None)
    assert len(report.blocks) == 4
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.ray
def test_tokens_that_are_few_for_the_widest_layer_are_named(source, tmp_path, caplog, ray_session):
    # 128 columns need 1024 tokens.
    for length in (128, 127):
        run(local.settings(source, tmp_path / str(length)), 1, tiny.tokens(batch=8, length=length))
        few = [record.getMessage() for record in caplog.records if "are few" in record.getMessage()]
        assert bool(few) == (length == 127)
    assert "1016 calibration tokens are few for layers of 128 columns: use 1024 or more" in few[0]


def test_more_calibrators_than_chunks_are_refused(source, tmp_path):
    with pytest.raises(UserError, match="workers=9 is more than the 8 chunks"):
        CalibrationPass(local.settings(source, tmp_path / "out"), TOKENS, 9)


def test_shards_send_sums_of_what_was_asked_for_of_which_none_may_be_missing(source, tmp_path):
    chosen = local.settings(source, tmp_path / "out", propagate="quantized")
    first, second = (Calibrator(chosen, {number: TOKENS[:2]}) for number in range(2))
    *keys, last = [group.key for group in Task(chosen).layer_groups[0]]
    collected = [first.collect(0, [*keys, last]), second.collect(0, keys)]
    assert [list(found.sums) for found in collected] == [[*keys, last], keys]
    with pytest.raises(RuntimeError, match=re.escape(f"a shard's sums of {last} in block 0 are missing")):
        first.solve(0, [last], *collected)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_killed_in_the_middle_is_resumed_by_the_same_command(source, tmp_path, monkeypatch, ray_session):
    np.save(tmp_path / "tokens.npy", TOKENS.numpy().astype(np.uint16))

    def words(output):
        options = {
            "model": source,
            "output": output,
            "group_size": 32,
            "calibration.source": tmp_path / "tokens.npy",
            "calibration.sequences": 9,
            "calibration.sequence_length": 24,
            "evaluation.sequences": 0,
            "workers": 1,
        }
        return ["compress", *(f"{key}={value}" for key, value in options.items())]

    def command():
        command = [sys.executable, "-m", "hasten", *words(tmp_path / "out")]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = command()
    # 300 s: a start on a busy machine; what is waited for comes after some 15 s on a calm one.
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("model-*.safetensors"))) < 1 and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out" / "config.json").exists()
    again = command()
    printed = again.communicate()[0]
    assert again.returncode == 0
    assert printed.splitlines()[-1].startswith("report: ")
    monkeypatch.chdir(tmp_path)
    assert main(words(tmp_path / "whole")) == 0
    assert local.contents(tmp_path / "out") == local.contents(tmp_path / "whole")


@pytest.mark.ray
def test_what_a_calibrator_refuses_as_it_starts_is_told_once_and_not_tried_again(source, tmp_path, ray_session):
    copy = shutil.copytree(source, tmp_path / "m")
    compression = CalibrationPass(local.settings(copy, tmp_path / "out"), TOKENS, 2)
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"m does not exist: give the folder of a transformers checkpoint$"):
        compression.check_weights()
    assert compression.report.restarts == 0
