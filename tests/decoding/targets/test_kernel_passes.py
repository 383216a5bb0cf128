"""The kernels of a GPU's passes give transformers' logits, here in Triton's interpreter, in tests/gpu on the device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.accel.decoding.targets.families import build_decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.fused import attends_by_kernels, runs_kernels
from tests.models.tiny import build

ROOT = Path(__file__).parents[3]
RUN = """
import torch
from tests.kernels import interpreter
interpreter.speed_up()
from tests.decoding.targets.kernel_passes import MODELS, check
for family in MODELS:
    print(family, flush=True)
    check(family, torch.float32, "cpu", 1e-4)
print("passed")
"""


def test_passes_by_kernels_give_the_logits_of_transformers():
    # Triton reads TRITON_INTERPRET when it is imported: a process of its own for all models.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert done.stdout.split()[-1] == "passed"


@pytest.mark.parametrize(
    ("dtype", "head_size", "expected"),
    [
        (torch.float32, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 288, False),
        (torch.float64, 64, False),
        (torch.bfloat16, 64, False),  # wrong in the interpreter
    ],
)
def test_where_attention_is_a_kernel(monkeypatch, dtype, head_size, expected):
    example = torch.empty(0, dtype=dtype)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not runs_kernels(example)
    assert not attends_by_kernels(example, head_size)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attends_by_kernels(example, head_size) == expected


def test_passes_by_kernels_build_no_mask(monkeypatch):
    masks = []

    def run(self, slots, starts, ids, positions, allowed, logits):
        masks.append(allowed.numel())
        return run_of_target(self, slots, starts, ids, positions, allowed, logits)

    run_of_target = FastTarget._run
    monkeypatch.setattr(FastTarget, "_run", run)
    monkeypatch.setattr(FastTarget, "_run_kernels", lambda self, slots, starts, ids, positions, logits: ids)
    model = build("llama")
    decoder = build_decoder(model.config, ModelWeights(model, packs=False))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for interpreted in (True, False):
        target = FastTarget(decoder)
        target.reserve(1, 16)
        target.forward([0], [[5, 6, 7]], [[-1, 0, 0]])
        assert (masks.pop() == 0) == interpreted
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
