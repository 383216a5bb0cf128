"""Candidates of a tiny model whose levels are its weights with noise, and their losses computed by transformers."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.accel.compression.allocators.base import DROP, Choice, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.candidates import ORIGINAL, Candidates
from hasten.accel.compression.search.fitness import KL, Fitness, Perplexity
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

BLOCKS, SEQUENCES, LENGTH = 4, 6, 16
LEVELS = ("coarse", "fine", KEEP)
NOISE = {"coarse": 0.1, "fine": 0.02}
# Whole sequences in batches of 2, 2 and 1, and one cut sequence.
SAMPLE = Sample(((0, LENGTH), (1, LENGTH), (3, LENGTH), (4, LENGTH), (5, LENGTH), (2, 7)))
TOKENS = torch.randint(3, tiny.VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(5))


def architecture(folder: Path) -> Architecture:
    return Architecture(Checkpoint(folder))


def layer_units(model: Architecture, inside: bool = False) -> list[Unit]:
    """One unit for the layers of a block that share an input. inside: they are parts of attention and mlp units."""
    units = []
    for index in range(model.num_blocks):
        inputs: dict[str, list[Any]] = {}
        for layer in model.linears(index):
            inputs.setdefault(layer.group, []).append(layer)
        for layers in inputs.values():
            attention = layers[0].module.startswith("self_attn.")
            weights = sum(layer.rows * layer.columns for layer in layers)
            choices = tuple(Choice(level, bits * weights) for bits, level in zip((2, 4, 16), LEVELS, strict=True))
            names, name = tuple(layer.name for layer in layers), layers[0].name
            around = f"{index}.{'attention' if attention else 'mlp'}" if inside else None
            units.append(Unit(name, names, index, layers[0].module, weights, choices, around))
    return units


def part_units(blocks: int, kinds: Sequence[str] = ("attention", "mlp")) -> list[Unit]:
    choices = (Choice(DROP, 0), Choice(KEEP, 0))
    return [Unit(f"{block}.{kind}", (), block, kind, 0, choices) for block in range(blocks) for kind in kinds]


def noisy(model: Architecture) -> Callable[[str, str], Tensor]:
    """Weights of a layer at a level: the original's with deterministic noise."""

    def weight(layer: str, level: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, layer + level)))
        tensor = model.checkpoint.tensor(f"{layer}.weight")
        return tensor + torch.randn(tensor.shape, generator=generator) * NOISE[level]

    return weight


def candidates(folder: Path, fitness: Fitness | None = None, units: Sequence[Unit] = (), **options: Any) -> Candidates:
    model = architecture(folder)
    options = {"batch": 2, "weights": noisy(model), "tokens": TOKENS, **options}
    return Candidates(model, units=list(units) or layer_units(model), fitness=fitness or KL(), **options)


def genomes(units: Sequence[Unit], count: int, seed: int = 0) -> list[Genome]:
    """Random genomes, many of which share a prefix."""
    draw = random.Random(seed)
    parent = [draw.randrange(len(unit.choices)) for unit in units]
    found = []
    for _ in range(count):
        child = list(parent)
        for place in draw.sample(range(len(units)), 3):
            child[place] = draw.choice([ORIGINAL, *range(len(units[place].choices))])
        found.append(tuple(child))
    return found


def expected(original: Any, changed: Any, fitness: Fitness, sample: Sample = SAMPLE) -> float:
    """Mean fitness of a whole model of transformers, each sequence run alone and whole, in float64."""
    sums, scored = 0.0, 0
    with torch.no_grad():
        for number, used in sample.parts:
            stop = min(used, LENGTH - 1)
            tokens, targets = TOKENS[number : number + 1], TOKENS[number, 1 : stop + 1, None]
            p, q = (model(input_ids=tokens).logits[0, :stop].double().log_softmax(-1) for model in (original, changed))
            kl = (p.exp() * (p - q)).sum()
            sums += float(-q.gather(-1, targets).sum() if isinstance(fitness, Perplexity) else kl)
            scored += stop
    return sums / scored


def assembled(folder: Path, units: Sequence[Unit], genome: Genome) -> Any:
    """The whole model of transformers with the weights of a genome."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weight = noisy(architecture(folder))
    for unit, choice in zip(units, genome, strict=True):
        for layer in unit.layers:
            if choice != ORIGINAL and unit.choices[choice].level != KEEP:
                model.get_submodule(layer).weight.data = weight(layer, unit.choices[choice].level)
    return model
