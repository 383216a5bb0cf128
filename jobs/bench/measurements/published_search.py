"""EvoPress's own search on our level database, converted to the files that it reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.levels.units import make_units
from hasten.accel.compression.search.candidates import Candidates
from hasten.accel.compression.search.fitness import KL
from hasten.accel.compression.search.samples import Sample
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.bench.processes.runs import peer_search
from hasten.jobs.common.calibration import original
from hasten.jobs.common.schema import Evaluation
from hasten.jobs.common.texts import Texts, recorded_origin
from hasten.jobs.search.options import SearchTokens


class PeerResult(TypedDict):
    """Result and cost of the published search; levels: bits by layer name."""

    cpu_seconds: float
    levels: dict[str, int]
    bytes_per_weight: float


class PublishedSearch:
    """The peer's search on the model, levels and tokens of our search.

    model: as in `hasten search`. levels: finished level database with one quantized level for every number of bits.
    source, sequences: text that candidates are compared on, as in `hasten search`. folder: for all written files.
    """

    def __init__(self, model: str, levels: Path, source: str | None, sequences: int, folder: Path) -> None:
        self._path = original(model)
        self._texts = Texts(self._path, "auto", None, recorded_origin(levels))
        self._architecture = Architecture(Checkpoint(self._path))
        self._database = LevelDatabase.read(levels.absolute(), self._architecture)
        self._units = make_units(self._database, "none")
        self._source, self._sequences, self._folder = source, sequences, folder

    def run(self, python: str, checkout: str, schedule: Mapping[str, object]) -> PeerResult:
        """Run the search; bytes_per_weight is of the peer's level database. schedule: options of the peer script."""
        chosen = SearchTokens(self._source, self._sequences)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "tokens.npy"
        drawn = self._texts.search(chosen)
        np.save(file, drawn.numpy())
        place = self._folder / "database"
        written = self._write(place)
        fixed = {"checkout": checkout, "model": self._path, "database": place, "tokens": file}
        peer = peer_search(python, self._folder, {**fixed, **schedule})
        weights = sum(unit.weights for unit in self._units)
        return PeerResult(cpu_seconds=peer["cpu_seconds"], levels=peer["levels"], bytes_per_weight=written / weights)

    def held_out(self, bits: Mapping[str, int], source: str | None, windows: int) -> float:
        """KL divergence from the original, on held-out text, of the layers at these bits."""
        evaluation = Evaluation(source=source, sequences=windows)
        held_out = self._texts.evaluate(evaluation)
        assert held_out is not None, "windows=0"
        tokens = held_out.tokens
        candidates = Candidates(self._architecture, self._units, self._database.weight, tokens, KL(), batch=1)
        genome = tuple(unit.index(self._level(bits[unit.name])) for unit in self._units)
        whole = Sample(tuple((number, tokens.shape[1]) for number in range(len(tokens))))
        return candidates.evaluate([genome], whole)[0]

    def _write(self, place: Path) -> int:
        """Write every level as the peer reads it, a file of float32 weights; returns their bytes."""
        written = 0
        for unit in self._units:
            folder = place / unit.name
            folder.mkdir(parents=True, exist_ok=True)
            for choice in unit.choices:
                file = folder / f"{_bits(choice.level)}.pth"
                torch.save(self._database.weight(unit.name, choice.level).float(), file)
                written += file.stat().st_size
        return written

    def _level(self, bits: int) -> str:
        return next(choice.level for choice in self._units[0].choices if _bits(choice.level) == bits)


def _bits(level: str) -> int:
    scheme = parse_level(level).loader_scheme
    if scheme is None:
        raise TypeError(f"level {level} is not quantized")
    return scheme.weights.bits
