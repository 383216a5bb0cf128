"""Result of a quantizer or a pruner for the rows of one or several layers."""

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

# A report's entries for a layer at a level; every kind of level adds entries of its own.
Facts = dict[str, Any]


class CompressedWeight(Protocol):
    """A compressed weight (R, C) that can be cut and joined by rows."""

    @property
    def bits(self) -> int:
        """Exact size."""

    def rows(self, start: int, stop: int) -> Self:
        """Rows start to stop, such as those of one of several layers that were solved together."""

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """One weight from its consecutive pieces."""


W = TypeVar("W", bound=CompressedWeight, covariant=True)


@dataclass(frozen=True)
class Result(Generic[W]):
    """A compressed weight (R, C) with its squared error, row by row.

    error, power: (R,) float32, mean squared error of the output and mean squared output over the calibration tokens.
    Both are of the weight as it is stored and of the collected Hessian, without a method's damping, so that errors of
    all methods and levels can be compared. Without statistics, squared error of the weights and squared weights, which
    are comparable with each other only. of_output: True where they are of the output. notes: messages for the report
    (damping raised, fallback taken).
    """

    weight: W
    error: Tensor
    power: Tensor
    notes: tuple[str, ...] = field(default=())
    of_output: bool = False

    def rows(self, start: int, stop: int) -> "Result[W]":
        """Result of rows start to stop."""
        weight, error, power = self.weight.rows(start, stop), self.error[start:stop], self.power[start:stop]
        return Result(weight, error, power, self.notes, self.of_output)

    @classmethod
    def join(cls, parts: "list[Result[W]]") -> "Result[W]":
        """One result from those of a layer's consecutive pieces."""
        weights = [part.weight for part in parts]
        error, power = torch.cat([part.error for part in parts]), torch.cat([part.power for part in parts])
        return cls(type(weights[0]).join(weights), error, power, parts[0].notes, parts[0].of_output)
