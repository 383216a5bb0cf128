"""What all compression methods have in common: the statistics that they need, and what is made of these once."""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from hasten.accel.compression.calibration.statistics import Hessian

# What a method makes of the statistics: a factor of the Hessian, say.
P = TypeVar("P")


class Method(ABC, Generic[P]):
    """A quantizer, column quantizer or pruner of one linear layer.

    needs_hessian: whether the calibration pass must collect the Hessian of the layers' inputs.
    """

    needs_hessian: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, hessian: Hessian | None) -> P:
        """What depends on the inputs alone, made once for every layer and level that shares them.

        hessian: of the layers' input over the calibration tokens, None where there is none.
        """
