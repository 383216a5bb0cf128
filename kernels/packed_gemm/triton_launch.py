"""Launches the products of packed codes, which integers, small floats and signs share."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.packed_gemm import triton_gemv, triton_matmul
from hasten.kernels.packed_gemm.choice import Configuration, Gemv, Problem, configuration, measure, problem

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MAX_X_ROWS = 4
_SUM_BLOCK = 1024


@dataclass(frozen=True)
class Codes:
    """A weight of R rows and C columns as the kernels read it.

    words: int32 (R, W), the codes of a row from the lowest bit on; planes of codes follow each other, in whole words.
    scale: (S, G), S = R / row_group rounded up, of groups of `group` columns. A value is (code - zero point) * scale
    * factor * alpha; middle is the zero point where zero_point is None. is_float: codes are e4m3 (8 bits) or
    e2m1 (4 bits) and middle is 0; factor must then undo the division by 2**8 or 2**14. scale_format: "float", or "e8m0"
    or "e4m3" for scales stored as uint8. alpha: float32, one element. group_index: int32 (C,), the group of each
    column.
    """

    words: Tensor
    scale: Tensor
    columns: int
    bits: int
    group: int
    middle: float
    zero_point: Tensor | None = None
    group_index: Tensor | None = None
    planes: int = 1
    row_group: int = 1
    is_float: bool = False
    scale_format: str = "float"
    factor: float = 1.0
    alpha: Tensor | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.words.shape[0]

    def problem(self, x: Tensor) -> Problem:
        """What the choice of a configuration for this product depends on."""
        bits = self.bits * self.planes
        kind = "float" if self.is_float else "integer" if self.planes == 1 else "planes"
        return problem(len(x), self.rows, self.columns, bits, x.itemsize, kind)


def product(x: Tensor, codes: Codes, chosen: Configuration | None = None) -> Tensor:
    """Product (N, R) in the dtype of x (N, C); all tensors are on its device.

    chosen: the launch configuration, on which the result depends by rounding errors; None for the measured or default
    one.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the kernel multiplies {', '.join(map(str, DTYPES))}")
    if x.shape[1] != codes.columns:
        raise ValueError(f"x has {x.shape[1]} columns, and the weight has {codes.columns}")
    n, rows = len(x), codes.rows
    if n == 0 or rows == 0:
        return x.new_zeros(n, rows)
    if chosen is None:
        chosen = configuration(codes.problem(x), x.device)
    one = chosen.splits == 1
    out = torch.empty(chosen.splits, n, rows, dtype=x.dtype if one else torch.float32, device=x.device)
    if isinstance(chosen, Gemv):
        _gemv(x, codes, out, chosen)
    else:
        _matmul(x, codes, out, chosen)
    return out[0] if one else _sum_splits(out, x.dtype)


def tune(x: Tensor, codes: Codes) -> Configuration:
    """Measures configurations for products of this shape on x's GPU; later calls and processes use the fastest."""

    def seconds(chosen: Configuration) -> float:
        try:
            return float(triton.testing.do_bench(lambda: product(x, codes, chosen), 5, 20, return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    return measure(codes.problem(x), x.device, seconds)


def _sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    grid = (triton.cdiv(out.numel(), _SUM_BLOCK),)
    triton_matmul.sum_splits[grid](partial, out, out.numel(), len(partial), _SUM_BLOCK)
    return out


def _shared(codes: Codes) -> dict[str, object]:
    """Constants of both kernels."""
    unit = triton_gemv.unit_codes(codes.bits)
    gather = codes.group_index is not None or (codes.scale.shape[1] > 1 and codes.group % unit > 0)
    return {
        "GROUP": codes.group if gather else -(-codes.group // unit),
        "ROW_GROUP": codes.row_group,
        "BITS": codes.bits,
        "FLOAT": codes.is_float,
        "SCALE": codes.scale_format,
        "MIDDLE": codes.middle,
        "FACTOR": codes.factor,
        "ALPHA": codes.alpha is not None,
        "WRAP": codes.planes > 1,
        "SYMMETRIC": codes.zero_point is None,
        "GATHER": gather,
        "INDEXED": codes.group_index is not None,
    }


def _pointers(codes: Codes, words: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors; words stand for those that are None, which the kernels do not read."""
    tensors = (words, codes.scale, codes.zero_point, codes.group_index, codes.alpha)
    return tuple(words if tensor is None else tensor.contiguous() for tensor in tensors)


def _gemv(x: Tensor, codes: Codes, out: Tensor, chosen: Gemv) -> None:
    n, constants = len(x), _shared(codes)
    unit = triton_gemv.unit_codes(codes.bits)
    x_units = -(-codes.columns // unit)
    units = x_units * codes.planes
    dtype = DTYPES[x.dtype]
    if codes.columns % unit:
        x = torch.nn.functional.pad(x, (0, x_units * unit - codes.columns))
    x = x.contiguous()
    if x.dtype != torch.float32:
        x = (x if x.data_ptr() % 8 == 0 else x.clone()).flatten().view(torch.int64)
    vector = 1 if unit == 32 else 4  # a unit of 32 codes fills the registers with its x
    tile = chosen.warps * 4 * vector
    units_of_split = triton.cdiv(triton.cdiv(units, chosen.splits), tile) * tile
    x_rows = min(triton.next_power_of_2(n), _MAX_X_ROWS)
    group = constants["GROUP"]
    assert isinstance(group, int)
    whole_words = codes.words.shape[1] == units * (3 if codes.bits == 3 else 1)
    grid = (triton.cdiv(codes.rows, 8 * chosen.rows_of_thread), triton.cdiv(n, x_rows), chosen.splits)
    triton_gemv.kernel[grid](
        x,
        *_pointers(codes, codes.words.contiguous()),
        out,
        n,
        codes.rows,
        codes.columns,
        units,
        x_units,
        codes.words.shape[1],
        codes.scale.shape[1],
        units_of_split,
        NR=x_rows,
        RT=chosen.rows_of_thread,
        KW=chosen.warps,
        V=vector,
        ONE_SCALE=group % vector == 0 or codes.scale.shape[1] == 1,
        EVEN=whole_words and units_of_split * chosen.splits == units,
        DTYPE=dtype,
        num_warps=chosen.warps,
        **constants,
    )


def _matmul(x: Tensor, codes: Codes, out: Tensor, chosen: Configuration) -> None:
    assert not isinstance(chosen, Gemv)
    unit = triton_gemv.unit_codes(codes.bits)
    x_units = -(-codes.columns // unit)
    units = x_units * codes.planes
    words = codes.words
    if codes.bits == 3:
        # No copy where columns are divisible by 32, as in almost all models.
        words = torch.nn.functional.pad(words, (0, 3 * units - words.shape[1]))
    block_u = max(1, chosen.block_k // unit)
    units_of_split = triton.cdiv(triton.cdiv(units, chosen.splits), block_u) * block_u
    grid = (triton.cdiv(codes.rows, chosen.block_r), triton.cdiv(len(x), chosen.block_n), chosen.splits)
    x = x if x.stride(1) == 1 else x.contiguous()
    triton_matmul.kernel[grid](
        x,
        *_pointers(codes, words.contiguous()),
        out,
        len(x),
        codes.rows,
        codes.columns,
        x.stride(0),
        units,
        x_units,
        words.shape[1],
        codes.scale.shape[1],
        units_of_split,
        BLOCK_R=chosen.block_r,
        BLOCK_N=chosen.block_n,
        BLOCK_U=block_u,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        **_shared(codes),
    )
