"""Experts in 4-bit floats with a scale for each 32 input columns, as gpt-oss is published.

Source: OCP Microscaling Formats 1.0 (MXFP4: E2M1 elements, E8M0 scales), and transformers' Mxfp4Config (`quant_method:
mxfp4`): `NAME_blocks` [experts, outputs, groups, 16] holds two elements a byte, the first in the low bits, and
`NAME_scales` [experts, outputs, groups] exponents of two with a bias of 127. The dequantized tensor is the parameter
NAME [experts, inputs, outputs] of the model, which is transposed.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.models.quantized import Quantization, QuantizedTensor, belongs_to_activations
from hasten.accel.models.shards import Stored

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_BLOCKS, _SCALES = "_blocks", "_scales"
_BIAS, _GROUP = 127, 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Values of the codes 0 to 15: the highest bit is the sign.
VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))


class Mxfp4Quantization(Quantization):
    """A quantization_config of quant_method mxfp4."""

    @property
    def title(self) -> str:
        """See Quantization."""
        return "mxfp4 in groups of 32"

    def tensors(self, stored: Mapping[str, Stored]) -> tuple[dict[str, QuantizedTensor], set[str]]:
        """See Quantization."""
        claimed = {name for name in stored if belongs_to_activations(name)}
        tensors: dict[str, QuantizedTensor] = {}
        for name, place in stored.items():
            if place.dtype != torch.uint8 or not name.endswith((_BLOCKS, _SCALES)):
                continue
            base = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            for suffix in (_BLOCKS, _SCALES):
                if base + suffix not in stored:
                    raise UserError(f"tensor {base}{suffix} is missing from {place.file.parent}: {name} needs it")
            claimed.add(name)
            if name.endswith(_BLOCKS):
                tensors[base] = Mxfp4Experts(base, place, stored[base + _SCALES], self.dtype)
        return tensors, claimed


class Mxfp4Experts(QuantizedTensor):
    """The matrices of all experts, [experts, inputs, outputs]."""

    def __init__(self, name: str, blocks: Stored, scales: Stored, dtype: torch.dtype) -> None:
        super().__init__(name, {_BLOCKS: blocks, _SCALES: scales})
        self._dtype = dtype
        if len(blocks.shape) != 4 or 2 * blocks.shape[3] != _GROUP:
            raise UserError(
                f"tensor {name}{_BLOCKS} in {blocks.file} has shape {list(blocks.shape)}: it must be "
                "[experts, outputs, groups, 16]"
            )
        if scales.shape != blocks.shape[:3]:
            raise UserError(
                f"tensor {name}{_SCALES} in {scales.file} has shape {list(scales.shape)}: {name}{_BLOCKS} needs "
                f"{list(blocks.shape[:3])}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """See QuantizedTensor."""
        experts, outputs, groups, _ = self.parts[_BLOCKS].shape
        return experts, groups * _GROUP, outputs

    @property
    def dtype(self) -> torch.dtype:
        """See QuantizedTensor."""
        return self._dtype

    @property
    def arguments(self) -> "QuantizationArgs":
        """See QuantizedTensor."""
        from compressed_tensors.quantization import QuantizationArgs

        return QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=_GROUP, symmetric=True)

    def read(self) -> Tensor:
        """See QuantizedTensor."""
        experts, _, outputs = self.shape
        return torch.stack([self.columns(expert, 0, outputs).read().T for expert in range(experts)])

    def columns(self, matrix: int, first: int, last: int, step: int = 1) -> "Mxfp4Rows":
        """See QuantizedTensor."""
        return Mxfp4Rows(self, matrix, range(first, last, step))

    def check(self, check_finite: Callable[[Tensor, str], None]) -> None:
        """See QuantizedTensor: exponents of 255 stand for NaN."""
        _check_scales(self.parts[_SCALES].read(), check_finite, self.name)


class Mxfp4Rows(QuantizedTensor):
    """Some outputs of one expert as the rows of a matrix [outputs, inputs]."""

    def __init__(self, whole: Mxfp4Experts, expert: int, rows: range) -> None:
        name = f"{whole.name}[{expert}]"
        blocks, scales = whole.parts[_BLOCKS], whole.parts[_SCALES]
        _, outputs, groups, half = blocks.shape
        flat = [
            Stored(part.file, part.dtype, (outputs, width), part.begin + expert * outputs * width)
            for part, width in ((blocks, groups * half), (scales, groups))
        ]
        super().__init__(name, {_BLOCKS: flat[0], _SCALES: flat[1]})
        self._whole, self._rows = whole, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """See QuantizedTensor."""
        return len(self._rows), self._whole.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """See QuantizedTensor."""
        return self._whole.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk of these rows."""
        return sum(part.nbytes // part.shape[0] for part in self.parts.values()) * len(self._rows)

    @property
    def arguments(self) -> "QuantizationArgs":
        """See QuantizedTensor."""
        return self._whole.arguments

    @property
    def has_rows(self) -> bool:
        """See QuantizedTensor."""
        return True

    def read(self) -> Tensor:
        """See QuantizedTensor."""
        return self.read_rows([(0, len(self._rows))])

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """See QuantizedTensor."""
        parts = [self._read(part, runs) for part in self.parts.values()]
        return dequantize(*parts, self.dtype)

    def check(self, check_finite: Callable[[Tensor, str], None]) -> None:
        """See QuantizedTensor."""
        _check_scales(self._read(self.parts[_SCALES], [(0, len(self._rows))]), check_finite, self.name)

    def _read(self, part: Stored, runs: list[tuple[int, int]]) -> Tensor:
        """Bytes of the rows in runs of a part; those between them are read, too."""
        step = self._rows.step
        read = [part.read_rows([(self._rows[first], (count - 1) * step + 1)])[::step] for first, count in runs if count]
        return torch.cat(read) if read else torch.empty(0, part.shape[1], dtype=part.dtype)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight (R, C) from its elements (R, C / 2) uint8, two a byte, and exponents (R, C / 32) uint8."""
    values = torch.tensor(VALUES, dtype=dtype)
    weight = torch.empty(len(blocks), blocks.shape[1], 2, dtype=dtype)
    weight[..., 0] = values[(blocks & 15).int()]
    weight[..., 1] = values[(blocks >> 4).int()]
    exponents = (scales.int() - _BIAS)[..., None]
    return torch.ldexp(weight.view(len(blocks), -1, _GROUP), exponents).flatten(1)


def _check_scales(scales: Tensor, check_finite: Callable[[Tensor, str], None], name: str) -> None:
    highest = scales.max() if scales.numel() else scales.new_zeros(())
    check_finite(torch.where(highest == 255, torch.nan, 0.0), f"{name}{_SCALES}")
