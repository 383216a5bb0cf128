"""Methods that run out of memory as often as they are told to, wherever they are run."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.search.fitness import KL
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling


def eat(plate: str, times: int) -> None:
    """Raise MemoryError so many times, which are counted in a file."""
    file = Path(plate)
    eaten = len(file.read_bytes()) if file.exists() else 0
    if eaten < times:
        file.write_bytes(b"." * (eaten + 1))
        raise MemoryError("hungry")


@dataclass(frozen=True)
class HungryQuantizer(GPTQ):
    plate: str = ""
    times: int = 1

    def prepare(self, moment):
        eat(self.plate, self.times)
        return super().prepare(moment)


@dataclass(frozen=True)
class HungryFitness(KL):
    plate: str = ""
    times: int = 1

    def loss(self, logits: Tensor, targets: Tensor, stored):
        eat(self.plate, self.times)
        return super().loss(logits, targets, stored)


@dataclass(frozen=True)
class HungryDrafter(TokenRecycling):
    plate: str = ""
    times: int = 1

    def begin(self, context, memory):
        eat(self.plate, self.times)
        super().begin(context, memory)


def task(batch: int, plate: str, times: int) -> int:
    """The batch that it had in the end."""
    eat(plate, times)
    return batch
