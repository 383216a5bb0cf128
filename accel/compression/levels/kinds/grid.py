"""Codes on a uniform grid: `w3g128`, 3 bits with groups of 128; `w3`, one scale a row; `w3g128a`, with zero points.

The size of the groups of `w3gauto` depends on the columns of a layer, see calibration/group_sizes.py.

Level databases and checkpoints store it as compressed-tensors' `pack-quantized`, which transformers and vLLM load.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from torch import Tensor

from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import INTEGERS
from hasten.accel.compression.levels.base import AutoSize
from hasten.accel.compression.levels.quantized import QuantizedLevel
from hasten.accel.compression.quantizers.base import AUTO, Scheme

_NAME = re.compile(r"w(\d+)(?:g(\d+|auto))?(a?)")


@dataclass(frozen=True)
class GridLevel(QuantizedLevel):
    """All weights of a layer as codes on one grid of integers."""

    scheme: Scheme

    examples: ClassVar[tuple[str, ...]] = ("w4g128", "w3", "w4g128a")

    @classmethod
    def parse(cls, name: str) -> "GridLevel | None":
        """Level of a name like w4g128."""
        match = _NAME.fullmatch(name)
        return cls(Scheme(int(match[1]), group_size(match[2]), symmetric=not match[3])) if match else None

    @property
    def name(self) -> str:
        """`w3g128`; without `g` one scale a row, with `a` at the end zero points."""
        scheme = self.scheme
        return f"w{scheme.bits}{scheme.suffix}{'' if scheme.symmetric else 'a'}"

    @property
    def loader_scheme(self) -> LoaderScheme:
        """Packed codes."""
        return LoaderScheme(INTEGERS, self.scheme)

    def check(self, layer: str, columns: int) -> None:
        """UserError where group_size does not divide the layer's columns."""
        self.scheme.check(layer, columns)

    def of_group_size(self, size: AutoSize) -> "GridLevel":
        """The level with a size in place of `auto`; with zero points the one that all layers share."""
        return GridLevel(self.scheme.of_group_size(size.own if self.scheme.symmetric else size.shared))

    def of_expert(self) -> "GridLevel":
        """The symmetric level, because transformers cannot read zero points of fused experts."""
        return GridLevel(Scheme(self.scheme.bits, self.scheme.group_size, symmetric=True))

    def options(self) -> dict[str, int | float | str | bool]:
        """bits, group_size and symmetric."""
        return asdict(self.scheme)

    def stored(self, stored: Mapping[str, Tensor]) -> LoaderScheme:
        """The scheme with the groups of the stored tensors, and their zero points, which experts do not have."""
        scheme = replace(stored_scheme(self.scheme, stored), symmetric="weight_zero_point" not in stored)
        return LoaderScheme(INTEGERS, scheme)


def group_size(text: str | None) -> int | str:
    """Group size of a level's name; None is one scale a row."""
    return text if text == AUTO else int(text or -1)


def stored_scheme(scheme: Scheme, stored: Mapping[str, Tensor]) -> Scheme:
    """The scheme with the group size of stored tensors in place of `auto`."""
    if scheme.group_size != AUTO:
        return scheme
    return scheme.of_group_size(stored_group_size(stored["weight_shape"], stored["weight_scale"]))


def stored_group_size(shape: Tensor, scale: Tensor) -> int:
    """Group size of stored scales (R, G) of a weight whose shape (2,) is stored, too."""
    columns, groups = int(shape[1]), scale.shape[1]
    return -1 if groups == 1 else columns // groups
