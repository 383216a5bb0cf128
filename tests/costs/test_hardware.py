"""Predicted time of a layer's product: rooflines of tabled and of measured rates."""

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.costs.hardware import (
    FP4,
    FP8,
    INT8,
    PLAIN,
    MeasuredHardware,
    TabledHardware,
    arithmetic,
    experts_read,
)
from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import CONF

GPU = TabledHardware(terabytes=1.0, plain=100.0, fp8=200.0, efficiency=1.0)
TABLED = [path for path in sorted((CONF / "hardware").glob("*.yaml")) if path.stem != "measured"]


def test_a_few_rows_take_the_time_of_reading_and_many_that_of_computing():
    weights, bits = 10**9, 4 * 10**9
    assert GPU.seconds(weights, bits, PLAIN, rows=1) == pytest.approx(0.5e-3)
    assert GPU.seconds(weights, bits, PLAIN, rows=1000) == pytest.approx(20e-3)
    assert GPU.seconds(weights, bits, FP8, rows=1000) == pytest.approx(10e-3)


def test_a_gpu_without_an_arithmetic_computes_on_unpacked_weights():
    assert GPU.seconds(10**9, 10**9, FP4, rows=1000) == GPU.seconds(10**9, 10**9, PLAIN, rows=1000)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (None, PLAIN),
        (InputScheme("float", 8, "token"), FP8),
        (InputScheme("int", 8, "token"), INT8),
        (InputScheme("float", 4, "tensor_group", 16), FP4),
    ],
)
def test_the_inputs_of_a_level_say_the_arithmetic(inputs, kind):
    assert arithmetic(inputs) == kind


def test_one_token_reads_its_share_of_the_experts_and_many_all():
    assert experts_read(0.25, 1) == 0.25
    assert experts_read(0.25, 2) == 1 - 0.75**2
    assert experts_read(0.25, 1000) == pytest.approx(1.0)


@pytest.mark.parametrize("path", TABLED, ids=lambda path: path.stem)
def test_smaller_inputs_are_never_slower_in_the_tables(path):
    gpu = instantiate(OmegaConf.load(path))
    for kind in (FP8, INT8, FP4):
        assert gpu.operations_per_second(kind) >= gpu.operations_per_second(PLAIN)


def row(implementation, shape, seconds, rate, operations, device="cuda"):
    return {
        "implementation": implementation,
        "shape": shape,
        "device": device,
        "seconds": {"median": seconds},
        "bytes_per_second": rate,
        "flops_per_second": operations,
    }


def test_measured_rates_are_those_of_the_nearest_width(tmp_path):
    file = tmp_path / "kernels.json"
    rows = [
        row("kernel", "1x4096 4 bits 4096x4096/128", 1e-5, 2e12, 3e12),
        row("kernel", "1x4096 fp8 4096x4096", 1e-5, 3e12, 4e12),
        row("torch.mm of dequantized", "512x4096 4 bits 4096x4096/128", 1e-5, 1e12, 7e14),
        row("torch._scaled_mm, x in fp8", "64x4096 fp8 4096x4096", 1e-5, 1e12, 9e14),
        row("kernel", "1x4096 2 bits 4096x4096/128", 1e-5, 9e12, 3e12, device="cpu"),
    ]
    file.write_text(json.dumps({"rows": rows}))
    gpu = MeasuredHardware(str(file))
    assert gpu.bytes_per_second(4.25) == 2e12
    assert gpu.bytes_per_second(8.0) == 3e12
    # The dense matrix that the peer reads is of bfloat16, whatever the row says.
    assert gpu.bytes_per_second(16.0) == 4096 * 4096 * 2 / 1e-5
    assert gpu.operations_per_second(PLAIN) == gpu.operations_per_second(INT8) == 7e14
    assert gpu.operations_per_second(FP8) == 9e14


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}'])
def test_a_file_without_measurements_is_named(tmp_path, content):
    file = tmp_path / "kernels.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"hardware\.file=.*kernels.json"):
        MeasuredHardware(str(file))


@pytest.mark.parametrize("wrong", [{"terabytes": 0.0}, {"plain": -1.0}, {"fp8": -1.0}, {"efficiency": 1.5}])
def test_a_wrong_rate_is_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"hardware\.{name}="):
        TabledHardware(**wrong)
