"""Learning-rate schedules: cosine, and warm-up, stable, decay.

Source: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay);
Hägele et al. 2024, arXiv:2405.18392: a decay of 1 - sqrt, from any step of the stable part, gives the quality of a
training of that length.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Schedule(ABC):
    """warmup: share of all steps in which the rate rises from zero."""

    warmup: float = 0.03

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup={self.warmup} is wrong: expected 0 to 1")

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rate at a step, counted from 0, of `steps` in all."""
        rising = math.ceil(self.warmup * steps)
        return (step + 1) / rising if step < rising else self.after_warmup(step, rising, steps)

    @abstractmethod
    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Factor at a step from `rising` on."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the full rate to `floor` of it."""

    floor: float = 0.0

    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Falls from the end of the warm-up."""
        share = (step - rising) / max(1, steps - rising)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The full rate, and at the end a decay to zero. decay: share of all steps in which it falls."""

    decay: float = 0.2

    def after_warmup(self, step: int, rising: int, steps: int) -> float:
        """Constant until the decay begins."""
        falling = max(1, math.ceil(self.decay * steps))
        return decayed(step - (steps - falling), falling)


def decayed(step: int, steps: int) -> float:
    """1 - sqrt, at a step of a decay of `steps`; 1 before it begins."""
    return 1 - math.sqrt(max(0, step) / steps)
