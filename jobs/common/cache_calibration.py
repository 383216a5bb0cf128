"""Shared by jobs that sum over calibration sequences in tasks: finished parts are files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.cache.calibration import Sums, merged
from hasten.accel.cache.statistics import read_layers, write_layers
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.programs.cache_calibration import CacheCalibration, PartSums, calibrate_parts
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cluster import InWorkers, worker_resources
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Calibration, SummedTasks
from hasten.jobs.common.texts import Texts

_LOG = logging.getLogger(__name__)
# Name of the folder, in a job's output.
PARTS = ".parts"


@dataclass(frozen=True)
class CalibrationParts:
    """Parts (N, T) of the calibration tokens, and the arithmetic of their tasks.

    origin: everything that sums over them depend on, but for what is summed.
    """

    texts: Texts
    tokens: Sequence[Tensor]
    dtype: torch.dtype
    device: str
    origin: Record


def calibration_parts(config: SummedTasks, model: Path) -> CalibrationParts:
    """The parts of a job's options; UserError for a text that cannot be loaded."""
    texts = Texts(model, config.bos, config.template)
    size = config.sequences, config.sequence_length
    tokens = texts.calibrate(Calibration(config.source, *size, seed=config.seed), True)
    assert tokens is not None
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    parts = tokens.tensor_split(min(config.shards, len(tokens)))
    origin = {
        "model": Checkpoint(model).fingerprint(),
        "tokens": texts.report(model)["texts"]["calibration"]["fingerprint"],
        "shards": len(parts),
        "dtype": str(dtype),
        "device": device,
        "torch": torch.__version__,
    }
    return CalibrationParts(texts, parts, dtype, device, origin)


class PartFiles:
    """Files of the parts of a calibration, in a folder that is made for them. key: everything that they depend on."""

    def __init__(self, folder: Path, key: str, calibration: CacheCalibration) -> None:
        self._folder, self._calibration = folder, calibration
        self._files = [folder / f"{key}-{number}.safetensors" for number in range(len(calibration.parts))]

    def compute(self, config: InWorkers) -> PartSums:
        """Compute the missing parts; inside a Ray session. Returns what they cost, without their sums."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output={self._folder.parent} cannot be made ({error.strerror}): give another") from None
        numbers = [number for number, file in enumerate(self._files) if not file.exists()]
        count = len(self._files)
        if len(numbers) < count:
            _LOG.info("%d of %d parts are finished already in %s", count - len(numbers), count, self._folder)
        cpu, peak, finished = 0.0, 0, count - len(numbers)
        with Progress("calibrate", count, "part") as progress:
            progress.begin(finished)

            def done(number: int, part: PartSums) -> None:
                nonlocal cpu, peak, finished
                # One list of layers: those of a method follow those of the method before.
                write_layers(self._files[number], [layer for sums in part.sums for layer in sums], {})
                cpu, peak, finished = cpu + part.cpu_seconds, max(peak, part.peak_rss_bytes), finished + 1
                progress.update(finished, "")

            if numbers:
                calibrate_parts(self._calibration, numbers, config.workers, worker_resources(config), done)
        return PartSums((), cpu, peak)

    def total(self, place: int) -> Sums:
        """Sums of all parts, of the method at a place."""
        method = self._calibration.methods[place]
        return reduce(partial(merged, method), (self._sums(file, place) for file in self._files))

    def remove(self) -> None:
        """Remove the files, and the folder if nothing else is in it."""
        for file in self._files:
            file.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _sums(self, file: Path, place: int) -> Sums:
        layers = read_layers(file).layers
        count = len(layers) // len(self._calibration.methods)
        return list(layers[place * count : (place + 1) * count])
