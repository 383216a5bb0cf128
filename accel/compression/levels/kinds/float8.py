"""FP8 weights (e4m3): `fp8`, `fp8_static`, `fp8_block` and `fp8a16`.

Source: Micikevicius et al. 2022, arXiv:2209.05433; blocks: DeepSeek-AI 2024, arXiv:2412.19437. `fp8` has a scale a row,
and rounds inputs to FP8 with a scale a token. `fp8_static` has one scale for the weights and a calibrated one for the
inputs; layers that servers fuse share both, because a server would otherwise round the weights again. `fp8_block` has
scales for 128x128 weights and for 128 inputs of a token. `fp8a16` is `fp8` with inputs that are not rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import BYTES, BYTES_FLOAT
from hasten.accel.compression.levels.quantized import NamedLevel
from hasten.accel.compression.quantizers.floats import FloatScheme

_ROWS = FloatScheme(8, "channel")


@dataclass(frozen=True)
class Float8Level(NamedLevel):
    """All weights of a layer as FP8 codes."""

    variants: ClassVar[Mapping[str, LoaderScheme]] = {
        "fp8": LoaderScheme(BYTES_FLOAT, _ROWS, InputScheme("float", 8, "token")),
        "fp8_static": LoaderScheme(
            BYTES_FLOAT, FloatScheme(8, "tensor"), InputScheme("float", 8, "tensor", static=True)
        ),
        "fp8_block": LoaderScheme(BYTES_FLOAT, FloatScheme(8, "block", 128), InputScheme("float", 8, "group", 128)),
        "fp8a16": LoaderScheme(BYTES, _ROWS),
    }
    examples: ClassVar[tuple[str, ...]] = tuple(variants)
