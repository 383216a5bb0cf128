"""What all compression methods have in common: the statistics that they need, and what is made of these once."""

from typing import Any, ClassVar

from hasten.accel.compression.calibration.statistics import Hessian


class Method:
    """A quantizer, column quantizer or pruner of one linear layer.

    needs_hessian: whether the calibration pass must collect the Hessian of the layers' inputs.
    """

    needs_hessian: ClassVar[bool] = False

    def prepare(self, hessian: Hessian | None) -> Any:
        """What depends on the inputs alone, made once for every layer and level that shares them.

        hessian: Hessian of the layers' input over the calibration tokens, None where there is none.
        """
        return hessian
