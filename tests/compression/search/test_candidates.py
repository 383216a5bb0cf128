import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from accel.compression.allocation.base import DROP, Choice, Unit
from accel.compression.levels.level import KEEP
from accel.compression.search.candidates import ORIGINAL, Candidates, batches
from accel.compression.search.evopress import Genome, Sample
from accel.compression.search.fitness import KL, Fitness, Perplexity, SparseKL
from accel.models import embedded
from accel.models.architecture import Architecture
from accel.models.checkpoint import Checkpoint
from tests.models import tiny

BLOCKS, SEQUENCES, LENGTH = 4, 6, 16
LEVELS = ("coarse", "fine", KEEP)
NOISE = {"coarse": 0.1, "fine": 0.02}
# Whole sequences in batches of 2, 2 and 1, and a cut one.
SAMPLE = Sample(((0, LENGTH), (1, LENGTH), (3, LENGTH), (4, LENGTH), (5, LENGTH), (2, 7)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TOKENS = torch.randint(3, tiny.VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(5))


def architecture(folder: Path) -> Architecture:
    return Architecture(Checkpoint(folder))


def layer_units(model: Architecture, inside: bool = False) -> list[Unit]:
    """One unit for the layers of a block that share an input; within attention and mlp units if asked for."""
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
    """Weights of a layer at a level: the original's with noise that is always the same."""

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
    """Random genomes of which many begin alike."""
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


@pytest.mark.parametrize("fitness", [KL(), SparseKL(tiny.VOCABULARY), Perplexity()], ids=str)
def test_fitness_is_that_of_the_whole_model(folder: Path, original: Any, fitness: Fitness) -> None:
    made = candidates(folder, fitness)
    tried = genomes(made.units, 6)
    wanted = [expected(original, assembled(folder, made.units, genome), fitness) for genome in tried]
    # float32 through four blocks.
    assert made.evaluate(tried, SAMPLE) == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    assert len(set(wanted)) > 3  # else it would show nothing


def test_the_last_token_of_a_sequence_predicts_nothing_and_that_of_a_cut_one_does(folder: Path) -> None:
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
def test_losses_are_the_same_to_the_bit_alone_in_company_and_in_any_order(folder: Path, fitness: Fitness) -> None:
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


def test_losses_one_at_a_time_are_those_of_genomes_with_one_unit_changed(folder: Path, original: Any) -> None:
    made = candidates(folder)
    found = made.losses_one_at_a_time([0, 3])
    assert set(found) == {(unit, choice) for unit in range(len(made.units)) for choice in range(3)}
    sample = Sample(((0, LENGTH), (3, LENGTH)))
    for unit, choice in ((0, 0), (6, 1), (15, 0)):
        genome = [ORIGINAL] * len(made.units)
        genome[unit] = choice
        assert found[unit, choice] == made.evaluate([tuple(genome)], sample)[0]
        model = assembled(folder, made.units, tuple(genome))
        assert found[unit, choice] == pytest.approx(expected(original, model, KL(), sample), rel=1e-3, abs=1e-6)
    assert all(abs(found[unit, 2]) < 1e-6 < found[unit, 1] < found[unit, 0] for unit in range(len(made.units)))


def without(model: Any, kind: str, block: int) -> Any:
    """A model of transformers without a part: what it would add is zeroed, or the block taken out."""
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
    # The original of 6 sequences, and 4 batches that leave out a block.
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
    from accel.data.tokens import load_tokens

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    return load_tokens("library", tokenizer, 4, 64, "held_out")


def rounded(model: Architecture) -> Callable[[str, str], Tensor]:
    """Weights rounded to nearest in groups of 64, at levels named by their bits."""
    from accel.compression.quantizers.base import Scheme
    from accel.compression.quantizers.round_to_nearest import RoundToNearest

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
