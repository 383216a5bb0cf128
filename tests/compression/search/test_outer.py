"""Candidates that differ in output layer and embedding: losses and sensitivities are those of the whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.models.architecture import Architecture
from tests.compression.search.noisy import LEVELS, SAMPLE, architecture, assembled, candidates, expected, layer_units
from tests.compression.search.test_sensitivity import BATCHES, by_transformers, made
from tests.models import tiny


def units_of(model: Architecture) -> list[Unit]:
    """Units of one block and those of output layer and embedding."""
    units = layer_units(model)[:1]
    for layer in model.outer_layers().values():
        weights = layer.rows * layer.columns
        choices = tuple(Choice(level, bits * weights) for bits, level in zip((2, 4, 16), LEVELS, strict=True))
        units.append(Unit(layer.name, (layer.name,), model.num_blocks, layer.module, weights, choices))
    return units


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    # Gemma scales its embeddings and caps its logits.
    changes = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    return tiny.save(folder, "gemma3_text", tie_word_embeddings=request.param == "tied", **changes)


def genomes(units: list[Unit]) -> list[tuple[int, ...]]:
    """All choices of the last two units, which are output layer and embedding, or the tied pair."""
    return [(first % 3, *rest) for first, rest in enumerate(np.ndindex(*[3] * (len(units) - 1)))]


def test_losses_are_those_of_the_whole_model_and_do_not_depend_on_other_genomes(model: Path) -> None:
    units = units_of(architecture(model))
    tried = genomes(units)
    found = candidates(model, units=units, cache_bytes=0)
    original = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = [expected(original, assembled(model, units, genome), found.fitness) for genome in tried]
    # float32.
    assert found.evaluate(tried, SAMPLE) == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    assert torch.equal(candidates(model, units=units).losses(tried[::-1], SAMPLE).flip(0), found.losses(tried, SAMPLE))


def test_parts_are_those_of_the_whole_models_gradient(model: Path) -> None:
    units = units_of(architecture(model))
    for genome in ((0,) * len(units), (1, *[2] * (len(units) - 2), 0)):
        for batch, result in zip(BATCHES, made(model, units).measure(genome, BATCHES), strict=True):
            divergence, parts = by_transformers(model, units, genome, batch)
            assert result.divergence == pytest.approx(divergence, rel=1e-3)
            assert result.parts.numpy() == pytest.approx(np.array(parts), rel=2e-3, abs=1e-5 * divergence, nan_ok=True)
