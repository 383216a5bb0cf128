import os
import subprocess
import sys

import pytest
import torch

from hasten.kernels.dequantize import op as dequantize

SIZES = [(1, 8, 1), (3, 96, 3), (5, 1056, 11), (2, 2048, 1)]
CHECK = """
import torch
from hasten.kernels.dequantize.op import _launch, reference
for rows, columns, groups in {sizes}:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g = torch.Generator().manual_seed(columns)
        codes = torch.randint(0, 256, (rows, columns), generator=g, dtype=torch.uint8)
        scale = torch.rand(rows, groups, generator=g).to(dtype)
        zero = torch.randint(0, 256, (rows, groups), generator=g, dtype=torch.uint8)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = _launch(codes.to(device), scale.to(device), zero.to(device)).cpu()
        # Triton's interpreter cuts float32 to bfloat16 where the hardware rounds: one unit in the last of 8 bits.
        slack = 2**-7 if dtype == torch.bfloat16 and device == "cpu" else 0.0
        torch.testing.assert_close(found, reference(codes, scale, zero), rtol=slack, atol=0)
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_equals_the_reference_over_odd_sizes_and_dtypes():
    # Triton reads TRITON_INTERPRET when it is imported: a process of its own.
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(sizes=SIZES)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_the_kernel_compiles_ahead_of_time_for_sm_90():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hasten.kernels.dequantize.triton_kernel import kernel

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be compiled")
    signature = {
        "codes": "*u8",
        "scale": "*bf16",
        "zero_point": "*u8",
        "out": "*bf16",
        "columns": "i32",
        "groups": "i32",
        "size": "i32",
        "BLOCK": "constexpr",
    }
    source = ASTSource(kernel, signature, constexprs={"BLOCK": 1024})
    assert "sm_90" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_a_code_at_its_zero_point_is_zero():
    codes = torch.tensor([[3, 5, 0, 7]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 7]], dtype=torch.uint8)
    assert dequantize.dequantize(codes, scale, zero).tolist() == [[0.0, 1.0, -14.0, 0.0]]
