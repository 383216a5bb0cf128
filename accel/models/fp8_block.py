"""Weights in 8-bit floats with a scale for each block of rows and columns, as DeepSeek-V3 is published.

Source: DeepSeek-AI 2024, arXiv:2412.19437, and transformers' FineGrainedFP8Config (`quant_method: fp8`): the weight is
`weight * weight_scale_inv`, computed in float32 and rounded to the model's dtype.
Also read: one scale for a weight, scales that are powers of two (`scale_fmt: ue8m0`), other names of the scales, and
experts that are fused in one tensor with `NAME_scale_inv`.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.models.quantized import Quantization, QuantizedTensor, belongs_to_activations, check_rows
from hasten.accel.models.shards import Stored

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_CODES, _SCALE = "weight", "scale"


class Fp8Quantization(Quantization):
    """A quantization_config of quant_method fp8."""

    @property
    def title(self) -> str:
        """See Quantization."""
        block = self.config.get("weight_block_size")
        return f"fp8 in blocks of {'x'.join(map(str, block))}" if block else "fp8 with a scale for each weight"

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None where the config does not say."""
        block = self.config.get("weight_block_size")
        if block is None:
            return None
        if (
            not isinstance(block, list | tuple)
            or len(block) != 2
            or not all(isinstance(n, int) and n > 0 for n in block)
        ):
            raise UserError(f"weight_block_size={block!r} in {self.where} must be two positive integers")
        return block[0], block[1]

    def tensors(self, stored: Mapping[str, Stored]) -> tuple[dict[str, QuantizedTensor], set[str]]:
        """See Quantization."""
        block = self.block
        claimed = {name for name in stored if belongs_to_activations(name)}
        tensors: dict[str, QuantizedTensor] = {}
        for name, place in stored.items():
            if place.dtype not in _FLOATS:
                continue
            scale = next((scale for scale in _scale_names(name) if scale in stored), None)
            if scale is None:
                raise UserError(
                    f"tensor {name}_scale_inv is missing from {place.file.parent}: {name} is stored in 8-bit floats"
                )
            claimed |= {name, scale}
            tensors[name] = Fp8Tensor(name, scale, place, stored[scale], block, self.dtype)
        return tensors, claimed


class Fp8Tensor(QuantizedTensor):
    """A matrix, or a stack of matrices, in 8-bit floats.

    scale: name of its scales, which are at `scales`. block: rows and columns that share one. dtype: of what is read.
    """

    def __init__(
        self,
        name: str,
        scale: str,
        codes: Stored,
        scales: Stored,
        block: tuple[int, int] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(name, {_CODES: codes, _SCALE: scales})
        self._scale_name, self._dtype = scale, dtype
        self._block = self._find_block(block)

    @property
    def shape(self) -> tuple[int, ...]:
        """See QuantizedTensor."""
        return self.parts[_CODES].shape

    @property
    def dtype(self) -> torch.dtype:
        """See QuantizedTensor."""
        return self._dtype

    @property
    def arguments(self) -> "QuantizationArgs":
        """See QuantizedTensor."""
        from compressed_tensors.quantization import QuantizationArgs

        if self._block is None:
            return QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
        return QuantizationArgs(
            num_bits=8, type="float", strategy="block", block_structure=list(self._block), symmetric=True
        )

    @property
    def has_rows(self) -> bool:
        """See QuantizedTensor."""
        return len(self.shape) == 2

    def read(self) -> Tensor:
        """See QuantizedTensor."""
        scales = _values(self.parts[_SCALE].read())
        return self._times(self.parts[_CODES].read(), scales, None)

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """See QuantizedTensor."""
        index = torch.cat([torch.arange(first, first + count) for first, count in runs])
        return self._times(self.parts[_CODES].read_rows(runs), _values(self.parts[_SCALE].read()), index)

    def part(self, matrix: int, first: int, last: int) -> "Fp8Tensor":
        """See QuantizedTensor."""
        codes, scales = self.parts[_CODES], self.parts[_SCALE]
        rows = codes.shape[1]
        if self._block is None:
            # One scale for each matrix, or one for all of them.
            count = scales.shape[0] if scales.shape else 1
            begin = scales.begin + (matrix if count > 1 else 0) * scales.dtype.itemsize
            places: tuple[Stored, Stored] = (
                codes.part(matrix, first, last),
                Stored(scales.file, scales.dtype, (1, 1), begin),
            )
        else:
            height = self._block[0]
            if first % height or (last % height and last != rows):
                raise UserError(
                    f"tensor {self.name} in {self.file} has blocks of {height} rows: rows {first} to {last} cannot be "
                    "read alone"
                )
            places = codes.part(matrix, first, last), scales.part(matrix, first // height, -(-last // height))
        name = f"{self.name}[{matrix}]"
        return Fp8Tensor(name, self._scale_name, *places, self._block, self._dtype)

    def check(self, check_finite: Callable[[Tensor, str], None]) -> None:
        """See QuantizedTensor."""
        check_finite(_values(self.parts[_SCALE].read()), self._scale_name)
        if len(self.shape) == 2:
            check_rows(self.parts[_CODES], check_finite, self.name)
        else:
            check_finite(self.parts[_CODES].read(), self.name)

    def _times(self, codes: Tensor, scales: Tensor, index: Tensor | None) -> Tensor:
        """Codes times scales. index: numbers (N,) of the rows that the codes are; None for all of them."""
        weight = codes.float()
        if self._block is None:
            scales = scales.reshape(-1, 1, 1) if weight.ndim == 3 else scales.reshape(1, 1)
            return weight.mul_(scales).to(self._dtype)
        height, width = self._block
        rows, columns = self.shape[-2:]
        index = torch.arange(rows) if index is None else index
        scales = scales[..., index // height, :]
        # A view of whole blocks, so that no matrix of scales is made.
        whole = columns // width * width
        weight[..., :whole].unflatten(-1, (-1, width)).mul_(scales[..., : columns // width, None])
        if whole < columns:
            weight[..., whole:].mul_(scales[..., -1:])
        return weight.to(self._dtype)

    def _find_block(self, block: tuple[int, int] | None) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None for one scale of each matrix. UserError where none fits."""
        shape, found = self.shape, self.parts[_SCALE].shape
        if len(shape) not in (2, 3):
            raise UserError(f"tensor {self.name} in {self.file} has shape {list(shape)}: 8-bit floats are matrices")
        if block is not None and _fits(shape, found, block):
            return block
        if prod(found) == 1 or (len(shape) == 3 and found in ((shape[0],), (shape[0], 1), (shape[0], 1, 1))):
            return None
        if len(found) == len(shape) and not shape[-2] % found[-2] and not shape[-1] % found[-1]:
            # Experts may have other blocks than the config names.
            derived = shape[-2] // found[-2], shape[-1] // found[-1]
            if _fits(shape, found, derived):
                return derived
        of = "" if block is None else f" with weight_block_size={list(block)}"
        raise UserError(
            f"tensor {self._scale_name} in {self.parts[_SCALE].file} has shape {list(found)}, which does not fit "
            f"{self.name} of {list(shape)}{of}"
        )


def _scale_names(name: str) -> Iterator[str]:
    """Names that the scales of a weight have in published checkpoints."""
    yield from (f"{name}_scale_inv", f"{name}_scale")
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield from (f"{module}.scale", f"{module}.qscale_weight")


def _fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether scales of this shape are those of blocks of a tensor."""
    grid = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    return scales == (*shape[:-2], *grid)


def _values(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two with a bias of 127."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()
