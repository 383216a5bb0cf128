"""The hardware that a plan is made for, and the shapes at which its rates are measured."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hasten.accel.costs.estimate import Rates


@dataclass(frozen=True)
class Setting:
    """The hardware that a plan is made for.

    rates: of a process. gpus: GPUs of every worker. gpu_memory: bytes of each. nodes: nodes of the cluster.
    """

    rates: Rates
    gpus: int = 0
    gpu_memory: int = 0
    nodes: int = 1
    tokens_per_pass: float = 1.0


class Shapes(NamedTuple):
    """Dtype, hidden size and widest input of the model that a job computes most with; rates are measured at them."""

    dtype: torch.dtype
    hidden: int
    inner: int
