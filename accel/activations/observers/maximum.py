"""The largest magnitude: no calibration input is clipped.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (min-max range).
"""

from dataclasses import dataclass

from hasten.accel.activations.observers.base import InputObserver
from hasten.accel.activations.ranges import InputRange
from hasten.accel.activations.scheme import InputScheme


@dataclass(frozen=True)
class Maximum(InputObserver):
    """Observer that takes the largest magnitude."""

    def limit(self, inputs: InputRange, scheme: InputScheme) -> float:
        """See InputObserver."""
        return inputs.absmax
