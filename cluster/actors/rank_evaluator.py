"""An evaluator that is one rank of a group: it holds a part of every block of the models that it compares."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.divided import DividedArchitecture
from hasten.accel.models.exchange import ProcessExchange
from hasten.cluster.actors.divided_model import TENSOR_PARALLEL, Division, TensorParallelArchitecture
from hasten.cluster.actors.rank_calibrator import IDLE
from hasten.cluster.runtime.process_group import Rank
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes


@dataclass(frozen=True)
class Measured:
    """Sums over windows, CPU seconds of all processes, and the largest peak memory of a process, in bytes."""

    sums: Sums
    cpu_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class EvaluatorSpec:
    """Arguments of an evaluator, as picklable values. original: checkpoint to compare with, None for none."""

    model: Path
    original: Path | None
    division: Division
    dtype: torch.dtype
    device: str
    threads: int


class RankEvaluator(Rank):
    """Evaluates windows together with the other ranks, which get the same calls."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._spec = spec
        self._exchange: ProcessExchange | None = None

    def join(self, rank: int, device: str, *places: tuple[int, str]) -> None:
        """See Rank."""
        super().join(rank, device, *places)
        self._exchange = ProcessExchange(torch.distributed.new_group(backend="gloo", timeout=IDLE))

    def evaluate(self, windows: Windows, batch: int) -> Measured:
        """Sums over this rank's part of the windows.

        Tensor parallelism runs all windows on all ranks, each of which then scores its part. With ZeRO-3 a rank runs
        its own windows only. batch: windows that run through a block at once.
        """
        assert self._exchange is not None, "it has not joined"
        before = cpu_seconds()
        share = self.rank, self.size
        model = self._open(self._spec.model)
        original = None if self._spec.original is None else self._open(self._spec.original)
        if self._spec.division.mode == TENSOR_PARALLEL:
            sums = evaluate(model, windows, original, batch, share=share)
        else:
            sums = evaluate(model, windows.part(*share), original, batch)
        return Measured(sums, cpu_seconds() - before, peak_rss_bytes())

    def _open(self, folder: Path) -> Architecture:
        spec, checkpoint = self._spec, Checkpoint(folder)
        if spec.division.mode == TENSOR_PARALLEL:
            return TensorParallelArchitecture(checkpoint, spec.dtype, spec.device, self.size)
        assert self._exchange is not None
        offload = spec.division.offload is not None
        return DividedArchitecture(checkpoint, spec.dtype, spec.device, self._exchange, offload)
