"""A calibrator that is one rank of a group: it holds a part of every block, and chunks of its own."""

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.models.divided import DividedArchitecture
from hasten.accel.models.exchange import ProcessExchange
from hasten.cluster.actors.calibrator import Calibrator, Collected
from hasten.cluster.actors.divided_model import ZERO3, Division
from hasten.cluster.runtime.process_group import Rank

# A rank waits for another one that solves for this long without an error; a loss ends the group at once.
IDLE = timedelta(days=365)


class RankCalibrator(Calibrator, Rank):
    """A calibrator whose `collect` runs blocks together with the other ranks; it checks and solves by itself.

    All ranks of a group are made equally, and get the same calls of `collect` in the same order. chunks: of each rank.
    """

    def __init__(self, settings: Settings, division: Division, chunks: Sequence[Mapping[int, Tensor]]) -> None:
        assert division.mode == ZERO3, division
        super().__init__(settings, {})
        self._offload, self._chunks_of_ranks = division.offload is not None, chunks
        self._has_joined = False

    def join(self, rank: int, device: str, *places: tuple[int, str]) -> None:
        """See Rank."""
        super().join(rank, device, *places)
        self._chunks = self._chunks_of_ranks[rank]
        exchange = ProcessExchange(torch.distributed.new_group(backend="gloo", timeout=IDLE))
        settings = self._settings
        self._task.architecture = DividedArchitecture(
            self._task.checkpoint, settings.dtype, settings.device, exchange, self._offload, as_served=False
        )
        self._task.architecture.all_experts = settings.all_experts
        self._has_joined = True

    def collect(self, block: int, keys: Collection[str], stage: int = 0, *solved: Mapping[str, Any]) -> Collected:
        """See Calibrator."""
        # Else a rank that could not join would send the sums of no chunk.
        assert self._has_joined
        return super().collect(block, keys, stage, *solved)
