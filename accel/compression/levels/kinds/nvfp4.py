"""NVFP4: `nvfp4`, groups of 16 FP4 codes with FP8 scales, relative to one float32 scale; inputs are rounded alike.

Source: NVIDIA 2025, arXiv:2509.25149, section 2. `nvfp4a16` does not round inputs. Layers that servers fuse share the
float32 scale, because a server knows one for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import NVFP4
from hasten.accel.compression.levels.quantized import NamedLevel
from hasten.accel.compression.quantizers.floats import FloatScheme

_GRID = FloatScheme(4, "tensor_group", 16, "fp8")


@dataclass(frozen=True)
class NVFP4Level(NamedLevel):
    """All weights of a layer as NVFP4 codes."""

    variants: ClassVar[Mapping[str, LoaderScheme]] = {
        "nvfp4": LoaderScheme(NVFP4, _GRID, InputScheme("float", 4, "tensor_group", 16, scale="fp8")),
        "nvfp4a16": LoaderScheme(NVFP4, _GRID),
    }
    examples: ClassVar[tuple[str, ...]] = tuple(variants)
