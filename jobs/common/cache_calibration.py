"""Shared by jobs that sum over calibration sequences in tasks: finished parts are files."""

import logging
from functools import partial, reduce
from pathlib import Path

from hasten.accel.cache.calibration import Sums, merged
from hasten.accel.cache.statistics import read_layers, write_layers
from hasten.accel.errors import UserError
from hasten.cluster.programs.cache_calibration import CacheCalibration, PartSums, calibrate_parts
from hasten.jobs.common.cluster import InWorkers, worker_resources
from hasten.jobs.common.progress import Progress

_LOG = logging.getLogger(__name__)
# Name of the folder, in a job's output.
PARTS = ".parts"


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
