"""Base class of the methods that choose a layer's static input scale."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.activations.ranges import InputRange
from hasten.accel.activations.scheme import InputScheme


@dataclass(frozen=True)
class InputObserver(ABC):
    """A way to choose the magnitude that the largest code stands for.

    needs_histogram: whether the calibration pass must count magnitudes, and not only find the largest.
    """

    needs_histogram: ClassVar[bool] = False

    @abstractmethod
    def limit(self, inputs: InputRange, scheme: InputScheme) -> float:
        """The magnitude for inputs with a finite, positive absmax; larger inputs are clipped to it."""
