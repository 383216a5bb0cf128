"""Time of a layer's product on a GPU, from rates that are tabled or measured: a roofline over bytes and operations.

Source: Williams et al. 2009, doi:10.1145/1498765.1498785 (roofline). A product of n rows takes the longer of reading
its weight and of computing on it. Launches, attention, norms and communication are not part of it: levels do not
change them. Experts of a mixture are read as far as the tokens are expected to reach them.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from hasten.accel.compression.activations.scheme import InputScheme
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


def experts_read(experts: int, active: int, tokens: int) -> float:
    """Expected share of a mixture's experts that some of the tokens reach, if they choose evenly."""
    return 1 - (1 - active / experts) ** tokens


@dataclass(frozen=True)
class TabledHardware(Hardware):
    """A GPU by its published peaks. terabytes: memory read a second. teraops: dense operations a second, 10^12.

    efficiency: share of the peaks that kernels reach; on H100 and H200 copies reached 0.9 of the memory's peak and
    products of bfloat16 0.8.
    """

    terabytes: float
    teraops: dict[str, float] = field(default_factory=dict)
    efficiency: float = 0.8

    def __post_init__(self) -> None:
        if PLAIN not in self.teraops:
            raise UserError(f"hardware.teraops={dict(self.teraops)} lacks {PLAIN}, the rate of bfloat16")
        if not 0 < self.efficiency <= 1:
            raise UserError(f"hardware.efficiency={self.efficiency} is out of range: above 0, to 1")
        wrong = [value for value in (self.terabytes, *self.teraops.values()) if value <= 0]
        if wrong:
            raise UserError(f"hardware has a rate of {wrong[0]}: rates are above 0")

    def bytes_per_second(self, bits: float) -> float:
        """The same for all widths."""
        return self.terabytes * 10**12 * self.efficiency

    def operations_per_second(self, kind: str) -> float:
        """Of the table."""
        return self.teraops.get(kind, self.teraops[PLAIN]) * 10**12 * self.efficiency


@dataclass(frozen=True)
class MeasuredHardware(Hardware):
    """A GPU by rates that `hasten bench kernels` or `make gpu` measured on it. file: their kernels.json.

    Products with weights of a width are taken to read as fast as those of the nearest measured width.
    """

    file: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rates", _read(Path(self.file).expanduser()))

    def bytes_per_second(self, bits: float) -> float:
        """Of the nearest measured width."""
        reading: dict[float, float] = self._rates[0]
        return reading[min(reading, key=lambda width: (abs(width - bits), width))]

    def operations_per_second(self, kind: str) -> float:
        """The best that was measured in this arithmetic."""
        computing: dict[str, float] = self._rates[1]
        return computing.get(kind, computing[PLAIN])

    @property
    def _rates(self) -> tuple[dict[float, float], dict[str, float]]:
        raise NotImplementedError
