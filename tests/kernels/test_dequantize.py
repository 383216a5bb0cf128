"""Dequantization: the Triton kernel in Triton's interpreter, and compiled ahead of time for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from hasten.kernels.dequantize import dequantize

CHECK = """
from tests.kernels.dequantize_cases import DTYPES, LAYOUTS, SIZES, check
for size in SIZES:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            check(size, dtype, layout, "cpu")
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_equals_the_reference_over_odd_sizes_strides_and_dtypes():
    # Triton reads TRITON_INTERPRET when it is imported: a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda number: f"sm_{number}")
def test_the_kernel_compiles_ahead_of_time(capability, dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hasten.kernels.dequantize.triton_kernel import kernel

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be compiled")
    signature = {
        "codes": "*u8",
        "scale": f"*{dtype}",
        "zero_point": "*u8",
        "out": f"*{dtype}",
        "columns": "i32",
        "groups": "i32",
        "group_size": "i32",
        "BLOCK": "constexpr",
    }
    source = ASTSource(kernel, signature, constexprs={"BLOCK": 1024})
    assembly = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert f"sm_{capability}" in assembly


def test_a_code_at_its_zero_point_is_zero():
    codes = torch.tensor([[3, 5, 0, 7]], dtype=torch.uint8)
    scale, zero_point = torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 7]], dtype=torch.uint8)
    assert dequantize(codes, scale, zero_point).tolist() == [[0.0, 1.0, -14.0, 0.0]]
