"""Time of a layer's product on a GPU, from rates that are tabled or measured: a roofline over bytes and operations.

Source: Williams et al. 2009, doi:10.1145/1498765.1498785 (roofline). A product of n rows takes the longer of reading
its weight and of computing on it. Launches, attention, norms and communication are not part of it: levels do not
change them. Experts of a mixture are read as far as the tokens are expected to reach them.
"""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError

# Arithmetic of a product, by its inputs; weights in fewer bits are unpacked to that of the inputs.
PLAIN, FP8, INT8, FP4 = "plain", "fp8", "int8", "fp4"


def arithmetic(inputs: InputScheme | None) -> str:
    """Arithmetic that a level needs whose inputs are rounded so; None: not rounded."""
    if inputs is None:
        return PLAIN
    if inputs.bits == 4:
        return FP4
    return INT8 if inputs.kind == "int" else FP8


class Hardware(ABC):
    """Rates of a GPU."""

    @abstractmethod
    def bytes_per_second(self, bits: float) -> float:
        """Rate at which a kernel reads a weight of this many bits, stored bytes."""

    @abstractmethod
    def operations_per_second(self, kind: str) -> float:
        """Rate of products in an arithmetic; that of PLAIN where the GPU lacks it, since servers then unpack."""

    def seconds(self, weights: int, bits: int, kind: str, rows: float, read: float = 1.0) -> float:
        """Seconds of the product of `rows` inputs with a weight of `weights` elements that takes `bits` in all.

        read: share of the weight that is read, of experts that not all tokens reach.
        """
        reading = bits / 8 * read / self.bytes_per_second(bits / max(weights, 1))
        return max(reading, 2 * weights * rows / self.operations_per_second(kind))


def experts_read(share: float, tokens: int) -> float:
    """Expected share of a mixture's experts that some of the tokens reach, each of which is routed to `share` of them.

    Tokens are taken to choose evenly and independently.
    """
    return 1 - (1 - share) ** tokens


@dataclass(frozen=True)
class TabledHardware(Hardware):
    """A GPU by its published peaks.

    terabytes: 10^12 bytes of memory read a second. plain, fp8, int8, fp4: 10^12 dense operations a second, of bfloat16
    and of smaller inputs; 0 where the GPU lacks them. efficiency: share of the peaks that kernels reach; on H100 and
    H200 copies reached 0.9 of the memory's peak, and products of bfloat16 0.8.
    """

    terabytes: float = 3.35
    plain: float = 989.0
    fp8: float = 0.0
    int8: float = 0.0
    fp4: float = 0.0
    efficiency: float = 0.8

    def __post_init__(self) -> None:
        for name in ("terabytes", PLAIN):
            if getattr(self, name) <= 0:
                raise UserError(f"hardware.{name}={getattr(self, name)} is out of range: above 0")
        for name in (FP8, INT8, FP4):
            if getattr(self, name) < 0:
                raise UserError(f"hardware.{name}={getattr(self, name)} is out of range: 0 (lacking) or more")
        if not 0 < self.efficiency <= 1:
            raise UserError(f"hardware.efficiency={self.efficiency} is out of range: above 0, at most 1")

    def bytes_per_second(self, bits: float) -> float:
        """The same for all widths."""
        return self.terabytes * 10**12 * self.efficiency

    def operations_per_second(self, kind: str) -> float:
        """Of the table."""
        return (getattr(self, kind) or self.plain) * 10**12 * self.efficiency


@dataclass(frozen=True)
class MeasuredHardware(Hardware):
    """A GPU by rates that `hasten bench kernels` or `make gpu` measured on it. file: their kernels.json.

    A weight is taken to be read as fast as that of the nearest measured width. UserError where the file has no
    measurement on a GPU.
    """

    file: str = "kernels.json"

    def __post_init__(self) -> None:
        _measured(self.file)

    def bytes_per_second(self, bits: float) -> float:
        """Of the nearest measured width."""
        reading = _measured(self.file).reading
        return reading[min(reading, key=lambda width: (abs(width - bits), width))]

    def operations_per_second(self, kind: str) -> float:
        """The best that was measured in this arithmetic."""
        computing = _measured(self.file).computing
        return computing.get(kind, computing[PLAIN])


class _Rates(NamedTuple):
    """reading: bytes a second, by the bits of a weight. computing: operations a second, by arithmetic."""

    reading: dict[float, float]
    computing: dict[str, float]


# Rows of kernels.json: `1x4096 4 bits 14336x4096/128` and `64x4096 fp8 14336x4096`.
_SHAPE = re.compile(r"\d+x\d+ (\d+ bits|fp8|mxfp4|nvfp4) (\d+)x(\d+)(?:/\d+)?")
_BITS = {"fp8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5}
_KERNEL, _DENSE = "kernel", "torch.mm of dequantized"
_ARITHMETIC = {_KERNEL: PLAIN, _DENSE: PLAIN, "torch._scaled_mm, x in fp8": FP8}
_PLAIN_BITS = 16.0


@cache
def _measured(file: str) -> _Rates:
    try:
        rows = json.loads(Path(file).expanduser().read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"hardware.file={file} is no kernels.json of `hasten bench kernels` or `make gpu` ({type(error).__name__})"
        ) from None
    reading: dict[float, float] = {}
    computing: dict[str, float] = {}
    for row in rows:
        match = _SHAPE.fullmatch(row["shape"])
        if match is None or row["device"] != "cuda":
            continue
        kind, seconds = match[1], row["seconds"]["median"]
        if row["implementation"] == _KERNEL:
            bits, rate = _BITS.get(kind) or float(kind.split()[0]), row["bytes_per_second"]
            reading[bits] = max(reading.get(bits, 0.0), rate)
        elif row["implementation"] == _DENSE:
            dense = int(match[2]) * int(match[3]) * _PLAIN_BITS / 8
            reading[_PLAIN_BITS] = max(reading.get(_PLAIN_BITS, 0.0), dense / seconds)
        if row["implementation"] in _ARITHMETIC:
            name = _ARITHMETIC[row["implementation"]]
            computing[name] = max(computing.get(name, 0.0), row["flops_per_second"])
    if PLAIN not in computing:
        raise UserError(f"hardware.file={file} has no product that was measured on a GPU")
    return _Rates(reading, computing)
