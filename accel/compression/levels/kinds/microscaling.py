"""Microscaling formats: `mxfp8` and `mxfp4`, groups of 32 with a power of two as scale; inputs are rounded alike.

Source: OCP Microscaling Formats (MX) v1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537. `mxfp8a16` and `mxfp4a16` leave
inputs as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import MXFP4, MXFP8
from hasten.accel.compression.levels.quantized import NamedLevel
from hasten.accel.compression.quantizers.floats import FloatScheme

_GROUP, _SCALE = 32, "power_of_two"
_FP8, _FP4 = (FloatScheme(bits, "group", _GROUP, _SCALE) for bits in (8, 4))
_FP8_INPUTS, _FP4_INPUTS = (InputScheme("float", bits, "group", _GROUP, scale=_SCALE) for bits in (8, 4))


@dataclass(frozen=True)
class MicroscalingLevel(NamedLevel):
    """All weights of a layer as MX codes."""

    variants: ClassVar[Mapping[str, LoaderScheme]] = {
        "mxfp8": LoaderScheme(MXFP8, _FP8, _FP8_INPUTS),
        "mxfp8a16": LoaderScheme(MXFP8, _FP8),
        "mxfp4": LoaderScheme(MXFP4, _FP4, _FP4_INPUTS),
        "mxfp4a16": LoaderScheme(MXFP4, _FP4),
    }
    examples: ClassVar[tuple[str, ...]] = tuple(variants)
