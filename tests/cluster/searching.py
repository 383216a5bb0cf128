"""What evaluators search in: levels of a tiny model, candidates, and one process that measures them."""

from pathlib import Path

import torch

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import make_levels
from hasten.accel.compression.levels.units import make_units
from hasten.accel.compression.search.candidates import Candidates
from hasten.accel.compression.search.fitness import KL
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.evaluator import EvaluatorSpec
from tests.compression import local

LEVELS = make_levels([2, 3, 4], [32], True)


def make(
    source: Path, output: Path, tokens: torch.Tensor, candidates: int
) -> tuple[EvaluatorSpec, list[tuple[int, ...]], Candidates]:
    """A model for evaluators, candidates by chance, and what measures them in this process."""
    chosen = local.settings(source, output, levels=LEVELS, level=LEVELS[1])
    local.compress(chosen, tokens)
    architecture = Task(chosen).architecture
    database = LevelDatabase.read(chosen.output, architecture)
    units = make_units(database, "none")
    model = EvaluatorSpec(source, chosen.output, tuple(units), tokens, KL(), batch=1)
    generator = torch.Generator().manual_seed(0)
    genomes = [tuple(row) for row in torch.randint(len(LEVELS), (candidates, len(units)), generator=generator).tolist()]
    return model, genomes, alone(model)


def alone(model: EvaluatorSpec) -> Candidates:
    """What measures candidates in this process."""
    architecture = Architecture(Checkpoint(model.checkpoint))
    weight = LevelDatabase.read(model.levels, architecture).weight
    return Candidates(architecture, model.units, weight, model.tokens, KL(), batch=model.batch)
