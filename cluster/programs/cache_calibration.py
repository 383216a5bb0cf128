"""Calibration of cache methods on a cluster: a task for each part of the sequences.

A part's sums do not depend on who computes them, and they are added in the order of the sequences: any number of
workers gives the same statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.calibration import Sums, gather
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results


@dataclass(frozen=True)
class CacheCalibration:
    """What is calibrated. parts: of the calibration sequences, (N, T) each. batch: sequences that run at once."""

    model: Path
    methods: Sequence[CacheMethod]
    parts: Sequence[Tensor]
    batch: int
    dtype: torch.dtype
    device: str

    @property
    def sequences(self) -> int:
        """Number of all sequences."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class PartSums:
    """Sums of each method over a part, and what they cost."""

    sums: Sequence[Sums]
    cpu_seconds: float
    peak_rss_bytes: int


def calibrate_parts(
    calibration: CacheCalibration,
    numbers: Sequence[int],
    workers: int,
    needs: ActorResources,
    done: Callable[[int, PartSums], None],
) -> None:
    """Compute parts, `workers` of them at a time; done(number, sums) is called as each ends. Inside a Ray session.

    A part whose process or node is lost is computed again; one that runs out of memory, once more with half the batch.
    """
    batches = Batches("batch", calibration.batch, "use more shards, a smaller sequence_length, or fewer workers")

    def arguments(place: int) -> tuple[object, ...]:
        part = calibration.parts[numbers[place]]
        model = calibration.model, calibration.dtype, calibration.device
        return (*model, calibration.methods, part, calibration.sequences, batches.of(place), int(needs.cpus))

    for place, sums in task_results(_gather, arguments, len(numbers), min(workers, len(numbers)), needs, batches):
        done(numbers[place], sums)


def _gather(
    model: Path,
    dtype: torch.dtype,
    device: str,
    methods: Sequence[CacheMethod],
    part: Tensor,
    sequences: int,
    batch: int,
    threads: int,
) -> PartSums:
    before = cpu_seconds()
    torch.set_num_threads(max(1, threads))
    # A cache holds keys and values before they are rounded for a server's.
    architecture = Architecture(Checkpoint(model), dtype, device, as_served=False)
    found = gather(architecture, methods, part, sequences, batch)
    sums = [[{name: value.cpu() for name, value in layer.items()} for layer in layers] for layers in found]
    return PartSums(sums, cpu_seconds() - before, peak_rss_bytes())
