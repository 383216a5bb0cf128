import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hasten.accel.compression.allocators.base import DROP, Choice, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.candidates import ORIGINAL, Candidates, batches
from hasten.accel.compression.search.errors import with_errors
from hasten.accel.compression.search.fitness import KL, Fitness, Perplexity, SparseKL
from hasten.accel.compression.search.samples import Sample
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from tests.compression.search.noisy import (
    BLOCKS,
    LENGTH,
    LEVELS,
    SAMPLE,
    SEQUENCES,
    architecture,
    assembled,
    candidates,
    expected,
    genomes,
    layer_units,
)
from tests.models import tiny


@pytest.mark.parametrize("fitness", [KL(), SparseKL(tiny.VOCABULARY), Perplexity()], ids=str)
def test_fitness_is_that_of_the_whole_model(folder: Path, original: Any, fitness: Fitness) -> None:
    made = candidates(folder, fitness)
    tried = genomes(made.units, 6)
    wanted = [expected(original, assembled(folder, made.units, genome), fitness) for genome in tried]
    # float32 through four blocks.
    assert made.evaluate(tried, SAMPLE) == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    assert len(set(wanted)) > 3  # else it would show nothing


def test_the_last_token_of_a_whole_sequence_scores_nothing_and_that_of_a_cut_one_does(folder: Path) -> None:
    assert candidates(folder).scored(SAMPLE) == 5 * (LENGTH - 1) + 7


@pytest.mark.parametrize("fitness", [KL(), SparseKL(8)], ids=str)
def test_original_weights_have_no_divergence(folder: Path, fitness: Fitness) -> None:
    made = candidates(folder, fitness)
    by_index = tuple(unit.index(KEEP) for unit in made.units)
    noise = (0,) * len(by_index)
    found = made.evaluate([noise, by_index, (ORIGINAL,) * len(by_index)], SAMPLE)
    assert max(map(abs, found[1:])) < 1e-6
    assert found[0] > 0.01


@pytest.mark.parametrize("fitness", [KL(), SparseKL(8), Perplexity()], ids=str)
def test_losses_do_not_depend_to_the_bit_on_other_genomes_or_their_order(folder: Path, fitness: Fitness) -> None:
    made = candidates(folder, fitness)
    tried = genomes(made.units, 8)
    together = made.losses(tried, SAMPLE)
    alone = torch.cat([candidates(folder, fitness).losses([genome], SAMPLE) for genome in tried[:3]])
    assert torch.equal(alone, together[:3])
    for seed in range(3):
        order = random.Random(seed).sample(range(8), 8)
        assert torch.equal(made.losses([tried[index] for index in order], SAMPLE), together[order])
    assert len(together.sum(1).unique()) > 3


def test_neither_memory_limits_nor_other_samples_change_a_bit(folder: Path) -> None:
    made, small = candidates(folder), candidates(folder, cache_bytes=0, states_bytes=1)
    tried = genomes(made.units, 5)
    small.evaluate(tried[:2], Sample(((3, LENGTH), (1, 5))))
    assert torch.equal(made.losses(tried, SAMPLE), small.losses(tried, SAMPLE))
    assert small.block_runs > made.block_runs  # a walk for every batch, and the other sample
    assert small._cache.bytes == 0


def test_batches_of_a_sample_give_the_losses_of_the_whole(folder: Path) -> None:
    made, other = candidates(folder), candidates(folder)
    tried = genomes(made.units, 4)
    pieces = batches(SAMPLE, made.batch)
    assert [len(batch.parts) for batch in pieces] == [2, 2, 1, 1]
    assert sum((batch.parts for batch in pieces), ()) == SAMPLE.parts
    whole = made.losses(tried, SAMPLE)
    assert torch.equal(torch.cat([other.losses(tried, batch) for batch in reversed(pieces)][::-1], 1), whole)
    joined = Sample(pieces[1].parts + pieces[2].parts)
    assert torch.equal(other.losses(tried, joined), whole[:, 2:5])


def test_every_prefix_of_choices_runs_once(folder: Path) -> None:
    made = candidates(folder, Perplexity())
    per_block = len(made.units) // BLOCKS
    base = [0] * len(made.units)
    third, second = list(base), list(base)
    third[3 * per_block] = 1  # differs from the base in block 3 alone
    second[2 * per_block + 1] = 1  # from block 2 on
    one = Sample(((0, LENGTH),))
    made.evaluate([tuple(base), tuple(third), tuple(second), tuple(base)], one)
    # Blocks 0 and 1 once, block 2 twice, block 3 three times.
    assert made.block_runs == 2 + 2 + 3
    made = candidates(folder, Perplexity())
    tried = genomes(made.units, 8)
    made.evaluate(tried, one)
    distinct = {
        (block, tuple(LEVELS[choice] for choice in genome[: (block + 1) * per_block]))
        for genome in tried
        for block in range(BLOCKS)
    }
    assert made.block_runs == len(distinct) < len(tried) * BLOCKS


def test_the_original_runs_once_for_a_sequence_and_only_where_the_fitness_needs_it(folder: Path) -> None:
    genome = (0,) * len(layer_units(architecture(folder)))
    runs = []
    for fitness in (KL(), Perplexity()):
        made = candidates(folder, fitness)
        for parts in (((0, LENGTH), (1, 5)), ((1, LENGTH), (0, 3))):
            before = made.block_runs
            made.evaluate([genome], Sample(parts))
            runs.append(made.block_runs - before)
    # Two walks of one sequence each, and at first one for each sequence's original.
    assert runs == [4 * BLOCKS, 2 * BLOCKS, 2 * BLOCKS, 2 * BLOCKS]


def test_errors_of_units_are_the_losses_with_one_of_them_changed(folder: Path, original: Any) -> None:
    made = candidates(folder)
    sample = Sample(((0, LENGTH), (3, LENGTH)))
    found = with_errors(made.units, made.evaluate, sample)
    for unit, choice in ((0, 0), (6, 1), (15, 0)):
        genome = [ORIGINAL] * len(made.units)
        genome[unit] = choice
        model = assembled(folder, made.units, tuple(genome))
        error = found[unit].choices[choice].error
        assert error == pytest.approx(expected(original, model, KL(), sample), rel=1e-3, abs=1e-6)
    for before, unit in zip(made.units, found, strict=True):
        assert [choice.bits for choice in unit.choices] == [choice.bits for choice in before.choices]
        low, middle, high = (choice.error for choice in unit.choices)
        assert high < 1e-6 < middle < low


def test_one_measured_choice_scales_the_others_by_their_output_errors() -> None:
    levels = [Choice("w2", 2, 0.9), Choice("w3", 3, 0.3), Choice("w4", 4, 0.1), Choice(KEEP, 16)]
    part = Unit("attention of block 0", (), 0, "attention", 0, (Choice(DROP, 0, 2.0), Choice(KEEP, 0)))
    units = [Unit("a", ("a",), 0, "a", 1, tuple(levels)), part]
    asked = []

    def evaluate(genomes: Any, sample: Sample) -> list[float]:
        asked.extend(genomes)
        return [1.0, 1.6, 1.25]

    found = with_errors(units, evaluate, SAMPLE, scaled=True)
    assert asked == [(ORIGINAL, ORIGINAL), (1, ORIGINAL), (ORIGINAL, 0)]
    assert [choice.error for choice in found[0].choices] == pytest.approx([1.8, 0.6, 0.2, 0.0])
    assert [choice.error for choice in found[1].choices] == [0.25, 0.0]


def test_errors_are_increases_of_the_loss_and_never_negative(folder: Path) -> None:
    units = layer_units(architecture(folder))[:2]

    def evaluate(genomes: Any, sample: Sample) -> list[float]:
        # The original's own loss is not zero where it is a log probability.
        return [3.0 + sum(0.0 if choice == ORIGINAL else 1.0 - 2 * choice for choice in genome) for genome in genomes]

    found = with_errors(units, evaluate, SAMPLE)
    assert [choice.error for choice in found[0].choices] == [1.0, 0.0, 0.0]


def test_units_genomes_and_samples_that_do_not_fit_are_named(folder: Path) -> None:
    units = layer_units(architecture(folder))
    choices = units[0].choices
    with pytest.raises(ValueError, match=r"model\.layers\.9\.x is no linear layer"):
        candidates(folder, units=[Unit("x", ("model.layers.9.x",), 0, "x", 1, choices)])
    with pytest.raises(ValueError, match="that of an earlier unit"):
        candidates(folder, units=[*units, units[0]])
    with pytest.raises(ValueError, match="no part of a block: router of 0"):
        candidates(folder, units=[Unit("x", (), 0, "router", 1, choices)])
    made = candidates(folder)
    with pytest.raises(ValueError, match="choice 3 of"):
        made.evaluate([(3,) * len(units)], SAMPLE)
    with pytest.raises(ValueError, match="17 tokens of sequence 0"):
        made.evaluate([(0,) * len(units)], Sample(((0, LENGTH + 1),)))
    with pytest.raises(ValueError, match="sequence 6"):
        made.evaluate([(0,) * len(units)], Sample(((SEQUENCES, 3),)))
    wrong = candidates(folder, weights=lambda layer, level: torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"q_proj at coarse is \(3, 3\), the layer is \(64, 64\)"):
        wrong.evaluate([(0,) * len(units)], SAMPLE)


@pytest.fixture(scope="module")
def text() -> Tensor:
    from hasten.accel.data.tokens import load_tokens

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    return load_tokens("library", tokenizer, 4, 64, "held_out")


def rounded(model: Architecture) -> Callable[[str, str], Tensor]:
    """Weights rounded to nearest in groups of 64, at levels named by their bits."""
    from hasten.accel.compression.quantizers.base import Scheme
    from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest

    def weight(layer: str, level: str) -> Tensor:
        tensor = model.checkpoint.tensor(f"{layer}.weight")
        return RoundToNearest().quantize(tensor, None, Scheme(int(level), 64)).weight.dequantize()

    return weight


def test_on_the_embedded_target_more_bits_diverge_less_and_sparse_kl_is_below_kl(text: Tensor) -> None:
    model = architecture(embedded.path("target"))
    units = [
        Unit(layer.name, (layer.name,), index, layer.module, layer.rows * layer.columns, choices)
        for choices in [tuple(Choice(level, 0) for level in ("2", "3", "4", "8", KEEP))]
        for index in range(model.num_blocks)
        for layer in model.linears(index)
    ]
    sample = Sample(tuple((number, 64) for number in range(4)))
    tried = [(choice,) * len(units) for choice in range(5)]
    found = {}
    for fitness in (KL(), SparseKL(64), Perplexity()):
        made = Candidates(model, units, rounded(model), text, fitness)
        found[fitness] = made.evaluate(tried, sample)
    kl, sparse, nll = found.values()
    assert abs(kl[4]) < 1e-6
    assert kl[:4] == sorted(kl[:4], reverse=True)
    assert all(0.5 * full < bound < full for full, bound in zip(kl[:4], sparse[:4], strict=True))
    assert nll[0] > nll[4]
    assert math.isfinite(nll[0])
