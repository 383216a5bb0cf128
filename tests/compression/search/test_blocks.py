from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.candidates import ORIGINAL
from hasten.accel.compression.search.fitness import KL, Perplexity
from hasten.accel.compression.search.samples import Sample
from tests.compression.search.noisy import (
    BLOCKS,
    LENGTH,
    SAMPLE,
    architecture,
    candidates,
    expected,
    genomes,
    layer_units,
    noisy,
    part_units,
)
from tests.models import tiny


def test_only_the_layers_that_differ_are_swapped(folder: Path) -> None:
    made = candidates(folder, Perplexity())
    coarse = tuple(0 for _ in made.units)
    made.evaluate([coarse], SAMPLE)
    assert made.swapped == 7 * BLOCKS
    made.evaluate([coarse], SAMPLE)
    assert made.swapped == 7 * BLOCKS
    made.evaluate([(1, *coarse[1:])], SAMPLE)  # q, k and v
    assert made.swapped == 7 * BLOCKS + 3
    assert 0 < made.swap_seconds < made.seconds


@pytest.mark.parametrize(("cached", "reads"), [(2**30, 1), (0, 3)])
def test_cached_weights_are_not_read_again(folder: Path, cached: int, reads: int) -> None:
    read: list[tuple[str, str]] = []
    weight = noisy(architecture(folder))

    def counted(layer: str, level: str) -> Tensor:
        read.append((layer, level))
        return weight(layer, level)

    made = candidates(folder, Perplexity(), weights=counted, cache_bytes=cached)
    coarse, fine = ((level,) * len(made.units) for level in (0, 1))
    for _ in range(3):
        made.evaluate([coarse], SAMPLE)
        made.evaluate([fine], SAMPLE)
    assert len(read) == reads * 2 * 7 * BLOCKS
    assert KEEP not in {level for _, level in read}


def test_the_cache_stays_within_its_limit_and_gives_up_the_oldest(folder: Path) -> None:
    made = candidates(folder, Perplexity())
    largest = 64 * 128 * 4
    limited = candidates(folder, Perplexity(), cache_bytes=2 * largest)
    tried = genomes(made.units, 6)
    assert limited.evaluate(tried, SAMPLE) == made.evaluate(tried, SAMPLE)
    assert 0 < limited._cache.bytes <= 2 * largest
    assert limited._cache.bytes == sum(tensor.nbytes for tensor in limited._cache._tensors.values())
    kept = list(limited._cache._tensors)
    limited.evaluate([(0,) * len(limited.units), (1,) * len(limited.units)], SAMPLE)
    assert kept[0] not in limited._cache._tensors


def without(model: Any, kind: str, block: int) -> Any:
    """A model of transformers without a part: the output of the part is zeroed, or the block removed."""
    decoder = model.get_decoder()
    layer = decoder.layers[block]
    if kind == "block":
        decoder.layers = torch.nn.ModuleList(each for at, each in enumerate(decoder.layers) if at != block)
        return model
    names = ("o_proj", "out_proj") if kind == "attention" else ("down_proj", "fc2")
    found = [value for name, value in layer.named_parameters() if any(part in names for part in name.split("."))]
    assert found
    for parameter in found:
        parameter.data.zero_()
    return model


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_a_dropped_part_adds_nothing_to_the_residual_stream(tmp_path: Path, family: str, kind: str) -> None:
    layers: Any = {"layer_types": ["full_attention"] * 3} if "gemma" in family else {}
    folder = tiny.save(tmp_path / "model", family, num_hidden_layers=3, **layers)
    whole, changed = (transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval() for _ in range(2))
    changed = without(changed, kind, 1)
    made = candidates(folder, units=part_units(3, [kind]))
    everything = (1, 1, 1)
    before, dropped, after = (made.evaluate([genome], SAMPLE)[0] for genome in (everything, (1, 0, 1), everything))
    assert dropped == pytest.approx(expected(whole, changed, KL()), rel=1e-3, abs=1e-6)
    assert dropped > 1e-3
    assert before == after == pytest.approx(0, abs=1e-6)


def test_dropping_both_parts_is_dropping_the_block(folder: Path) -> None:
    parts = candidates(folder, units=part_units(BLOCKS))
    blocks = candidates(folder, units=part_units(BLOCKS, ["block"]))
    genome = [1] * (2 * BLOCKS)
    genome[2:4] = (0, 0)
    assert parts.evaluate([tuple(genome)], SAMPLE) == blocks.evaluate([(1, 0, 1, 1)], SAMPLE)
    # The original on 6 sequences, and 4 batches that skip a block.
    assert blocks.block_runs == 6 * BLOCKS + 4 * (BLOCKS - 1)


def test_levels_inside_a_dropped_part_make_no_difference(folder: Path) -> None:
    model = architecture(folder)
    units = [*part_units(BLOCKS), *layer_units(model, inside=True)]
    made = candidates(folder, Perplexity(), units)
    genome = [1] * (2 * BLOCKS) + [0] * (len(units) - 2 * BLOCKS)
    genome[0] = 0  # attention of block 0
    other = list(genome)
    other[2 * BLOCKS] = 1  # q, k and v in it
    first, second = made.evaluate([tuple(genome), tuple(other)], Sample(((0, LENGTH),)))
    assert first == second
    assert made.block_runs == BLOCKS
    genome[0] = other[0] = 1
    first, second = made.evaluate([tuple(genome), tuple(other)], Sample(((0, LENGTH),)))
    assert first != second


def test_experts_of_a_mixture_are_swapped(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "mixtral")
    made = candidates(folder, Perplexity())
    expert = next(place for place, unit in enumerate(made.units) if "experts.2.w2" in unit.name)
    original = [ORIGINAL] * len(made.units)
    changed = list(original)
    changed[expert] = 0
    first, second = made.evaluate([tuple(changed), tuple(original)], Sample(((0, LENGTH), (1, LENGTH))))
    assert first != second
    assert made.swapped == 1  # the original, which is loaded, goes first
