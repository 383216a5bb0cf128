"""Base class of all compression methods: which statistics they need, and what they precompute from these."""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from hasten.accel.compression.calibration.statistics import Hessian

# What a method precomputes from the statistics, such as a factor of the Hessian.
P = TypeVar("P")


class Method(ABC, Generic[P]):
    """A quantizer, column quantizer or pruner of one linear layer.

    needs_hessian: whether the calibration pass must collect the Hessian of the layers' inputs.
    """

    needs_hessian: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, hessian: Hessian | None) -> P:
        """Precompute what depends on the layers' input alone; done once for all layers and levels with that input.

        hessian: Hessian of the layers' input over the calibration tokens; None where no statistics were collected.
        """
