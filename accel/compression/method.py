"""What all compression methods have in common: the statistics that they need, and what is made of these once."""

from typing import Any, ClassVar

from hasten.accel.compression.calibration.statistics import SecondMoment


class Method:
    """A quantizer, column quantizer or pruner of one linear layer.

    needs_second_moment: whether the calibration pass must collect the second moment of the layers' inputs.
    """

    needs_second_moment: ClassVar[bool] = False

    def prepare(self, moment: SecondMoment | None) -> Any:
        """What depends on the inputs alone, made once for every layer and level that shares them.

        moment: second moment of the layers' input over the calibration tokens, None where there is none.
        """
        return moment
