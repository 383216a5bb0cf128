"""Benchmark cases of skinny_gemm, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial

import torch

from hasten.kernels.skinny_gemm import c_kernel
from hasten.kernels.skinny_gemm.reference import pack_panels
from hasten.kernels.timing import Case, Operands, Skipped

_SHAPES = [(576, 1536), (4096, 4096)]
_ROWS = (1, 8, 16, 64, 512)


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each shape, ROWSxINPUTSxOUTPUTS."""
    if not c_kernel.is_available():
        yield Skipped("skinny_gemm", "there is no C compiler")
        return
    for inputs, outputs in _SHAPES[:1] if dry else _SHAPES:
        for rows in _ROWS:
            yield Case(
                op="skinny_gemm",
                shape=f"{rows}x{inputs}x{outputs}",
                dtype="float32*bfloat16",
                device_type="cpu",
                operands=partial(_operands, rows, inputs, outputs),
                kernel=_kernel,
                reference=_float32_product,
                nbytes=4 * rows * (inputs + outputs) + 2 * inputs * outputs,
                flops=2 * rows * inputs * outputs,
                # Outputs are sums of up to 4096 products of standard normal numbers, in different orders.
                rtol=1e-4,
                atol=1e-3,
            )


def _operands(rows: int, inputs: int, outputs: int, generator: torch.Generator, device: torch.device) -> Operands:
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    return torch.randn(rows, inputs, generator=generator), weight.float(), pack_panels(weight)


def _kernel(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return c_kernel.skinny_gemm(x, packed, len(weight))


def _float32_product(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    # The baseline is what a caller would run without the kernel. The op's reference unpacks the weight at each call.
    return x @ weight.T
