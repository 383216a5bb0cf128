"""Triton kernels against their references."""

import importlib

import pytest
import torch

from hasten.kernels.dequantize import dequantize, reference
from hasten.kernels.dispatch import use_triton
from tests.kernels.ops import OPS
from tests.kernels.ops.dequantize import inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_references(op, device):
    failed = []
    for name, check in importlib.import_module(f"tests.kernels.ops.{op}").checks(device):
        try:
            check()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)


def test_dequantize_runs_the_kernel_on_the_device(device):
    codes, scale, zero_point = inputs((5, 1056, 11), torch.float32)
    assert use_triton(codes.to(device))
    weight = dequantize(codes.to(device), scale.to(device), zero_point.to(device))
    assert weight.device.type == torch.device(device).type
    assert torch.equal(weight.cpu(), reference.dequantize(codes, scale, zero_point))


def test_dequantize_addresses_more_than_2_to_the_31_elements(device):
    if not device.startswith("cuda"):
        pytest.skip("takes minutes in Triton's interpreter")
    rows, columns = 2**16 + 3, 2**15
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of GPU memory")
    generator = torch.Generator(device).manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8, device=device)
    scale = torch.rand(rows, 4, generator=generator, device=device).bfloat16()
    zero_point = torch.randint(0, 16, (rows, 4), generator=generator, dtype=torch.uint8, device=device)
    weight = dequantize(codes, scale, zero_point)
    last = slice(rows - 8, rows)
    assert torch.equal(weight[last], reference.dequantize(codes[last], scale[last], zero_point[last]))
