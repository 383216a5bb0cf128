"""Integer weights and rounded inputs: `w8a8`, `w8a8s`, `w4g128a8` and `w4g128afp8`.

The grid of the weights is symmetric, and named as in levels/kinds/grid.py. `a8` rounds inputs to 8-bit integers, and
`afp8` to FP8, with a scale a token; `a8s` with one calibrated scale, which servers support for w8a8 alone. The codes of
w8a8 are stored as int8, which servers read; others are packed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import BYTES_INT, INTEGERS
from hasten.accel.compression.levels.base import AutoSize
from hasten.accel.compression.levels.kinds.grid import group_size, stored_scheme
from hasten.accel.compression.levels.quantized import QuantizedLevel
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.errors import UserError

_NAME = re.compile(r"w(\d+)(?:g(\d+|auto))?a(8|8s|fp8)")
_INPUTS = {
    "8": InputScheme("int", 8, "token"),
    "8s": InputScheme("int", 8, "tensor", static=True),
    "fp8": InputScheme("float", 8, "token"),
}
_BYTES = Scheme(8, -1, symmetric=True)


@dataclass(frozen=True)
class IntegerInputsLevel(QuantizedLevel):
    """All weights of a layer as codes on one grid of integers. rounding: of the inputs, `8`, `8s` or `fp8`."""

    scheme: Scheme
    rounding: str

    examples: ClassVar[tuple[str, ...]] = ("w8a8", "w8a8s", "w4g128a8", "w4g128afp8")

    @classmethod
    def parse(cls, name: str) -> "IntegerInputsLevel | None":
        """Level of a name like w4g128a8."""
        match = _NAME.fullmatch(name)
        if not match:
            return None
        level = cls(Scheme(int(match[1]), group_size(match[2]), symmetric=True), match[3])
        if level.inputs.static and level.scheme != _BYTES:
            raise UserError(f"level {name} is wrong: servers read static scales of inputs with w8a8s alone")
        if level.rounding == "fp8" and level.scheme.bits != 4:
            raise UserError(f"level {name} is wrong: servers read FP8 inputs with integer weights of 4 bits alone")
        return level

    @property
    def name(self) -> str:
        """`w4g128a8`: the grid, and the rounding of inputs."""
        return f"w{self.scheme.bits}{self.scheme.suffix}a{self.rounding}"

    @property
    def inputs(self) -> InputScheme:
        """By `rounding`."""
        return _INPUTS[self.rounding]

    @property
    def loader_scheme(self) -> LoaderScheme:
        """int8, or packed codes."""
        return LoaderScheme(BYTES_INT if self.scheme == _BYTES else INTEGERS, self.scheme, self.inputs)

    def of_group_size(self, size: AutoSize) -> "IntegerInputsLevel":
        """The level with the layer's own size in place of `auto`."""
        return IntegerInputsLevel(self.scheme.of_group_size(size.own), self.rounding)

    def stored(self, stored: Mapping[str, Tensor]) -> LoaderScheme:
        """The scheme with the groups of the stored tensors."""
        return replace(self.loader_scheme, weights=stored_scheme(self.scheme, stored))
