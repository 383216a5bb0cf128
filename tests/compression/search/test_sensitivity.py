import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.blocks import load_block
from hasten.accel.compression.search.operating_point import Observation, iterate, observe, with_parts
from hasten.accel.compression.search.sensitivity import Sensitivity, SensitivityPass
from tests.compression.search.noisy import (
    LENGTH,
    NOISE,
    TOKENS,
    architecture,
    assembled,
    layer_units,
    noisy,
    part_units,
)
from tests.models import tiny

BATCHES = [[0, 1], [3]]


def made(folder: Path, units: list[Unit], **options: Any) -> SensitivityPass:
    model = architecture(folder)
    return SensitivityPass(model, units, noisy(model), TOKENS, **options)


def by_transformers(folder: Path, units: list[Unit], genome: tuple[int, ...], batch: list[int]) -> tuple[float, Any]:
    """Divergence and parts from the gradient of the whole model's weights, as transformers and autograd compute it."""
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = assembled(folder, units, genome)
    with torch.enable_grad():
        q = model(input_ids=TOKENS[batch]).logits[:, :-1].log_softmax(-1)
        p = original(input_ids=TOKENS[batch]).logits[:, :-1].log_softmax(-1).detach()
        divergence = (p.exp() * (p - q)).sum()
        divergence.backward()
    parts = []
    for unit, choice in zip(units, genome, strict=True):
        layers = () if unit.choices[choice].level == KEEP else unit.layers
        changes = [(model.get_submodule(name).weight, original.get_submodule(name).weight) for name in layers]
        products = [float((weight.grad * (weight - before)).sum().detach()) / 2 for weight, before in changes]
        parts.append(math.fsum(products) if layers else math.nan)
    return float(divergence), parts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "opt"])
def test_parts_are_those_of_the_whole_models_gradient(tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path / "model", family)
    units = layer_units(architecture(folder))
    genome = tuple(place % 3 for place in range(len(units)))
    found = made(folder, units).measure(genome, BATCHES)
    for batch, result in zip(BATCHES, found, strict=True):
        divergence, parts = by_transformers(folder, units, genome, batch)
        assert result.tokens == len(batch) * (LENGTH - 1)
        assert result.divergence == pytest.approx(divergence, rel=1e-3)
        assert result.parts.numpy() == pytest.approx(np.array(parts), rel=2e-3, abs=1e-5 * divergence, nan_ok=True)


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_tiles_of_the_vocabulary_give_the_same_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    folder = tiny.save(tmp_path / "model", "gemma3_text")  # it caps its logits
    units = layer_units(architecture(folder))
    genome = (0,) * len(units)
    whole = made(folder, units).measure(genome, BATCHES)
    monkeypatch.setattr("hasten.accel.models.output_layer.tile_columns", lambda *_: 7)
    monkeypatch.setattr("hasten.accel.compression.search.sensitivity._KEPT_LOGITS_BYTES", kept_bytes)
    monkeypatch.setattr("hasten.accel.compression.search.sensitivity.TILE_TOKENS", 5)
    for before, found in zip(whole, made(folder, units).measure(genome, BATCHES), strict=True):
        assert found.divergence == pytest.approx(before.divergence, rel=1e-5)
        torch.testing.assert_close(found.parts, before.parts, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_parts_of_a_small_change_add_up_to_the_divergence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOISE, "fine", 0.003)
    units = layer_units(architecture(folder))
    (result,) = made(folder, units).measure((1,) * len(units), [[0, 1, 2, 3, 4, 5]])
    assert float(result.parts.sum()) == pytest.approx(result.divergence, rel=0.02)


def test_batches_and_groups_of_batches_do_not_affect_each_other(folder: Path) -> None:
    units = layer_units(architecture(folder))
    genome = (0,) * len(units)
    together = made(folder, units).measure(genome, BATCHES)
    apart = made(folder, units, states_bytes=1).measure(genome, BATCHES)
    (alone,) = made(folder, units).measure(genome, BATCHES[1:])
    for first, second in zip(together, apart, strict=True):
        assert torch.equal(first.parts, second.parts)
        assert first.divergence == second.divergence
    assert torch.equal(alone.parts, together[1].parts)


def test_units_of_a_dropped_part_and_kept_units_have_no_part(folder: Path) -> None:
    units = [*layer_units(architecture(folder), inside=True), *part_units(4)]
    names = [unit.name for unit in units]
    genome = [0] * (len(units) - 8) + [1] * 8
    genome[names.index("1.mlp")] = 0
    genome[0] = 2
    (result,) = made(folder, units).measure(tuple(genome), [[0]])
    missing = {names[place] for place in result.parts.isnan().nonzero().flatten().tolist()}
    inside = {unit.name for unit in units if unit.part_of == "1.mlp"}
    assert missing == {names[0], *inside, *(unit.name for unit in units if not unit.layers)}


def test_layers_of_experts_are_measured(tmp_path: Path) -> None:
    # transformers fuses experts, so the reference runs hasten's blocks, and autograd computes the weights' gradients.
    model = architecture(tiny.save(tmp_path / "model", "mixtral"))
    units, weight = layer_units(model), noisy(model)
    (result,) = SensitivityPass(model, units, weight, TOKENS).measure((0,) * len(units), [[0, 1]])
    blocks = [load_block(model, units, index) for index in range(model.num_blocks)]
    before, after = model.embed(TOKENS[:2]), model.embed(TOKENS[:2])
    with torch.enable_grad():
        for index, block in enumerate(blocks):
            before = model.run_block(block.module, index, before)
            for slot in block.slots:
                slot.linear.weight = torch.nn.Parameter(weight(slot.name, "coarse"))
            after = model.run_block(block.module, index, after, differentiable=True)
    logits = model.head(after.detach())
    log_q, log_p = logits.log_softmax(-1), model.head(before).log_softmax(-1)
    gradient = log_q.exp() - log_p.exp()
    gradient[:, -1] = 0
    layer = model.output_layer()
    inner = layer.inputs_gradient(gradient, logits, layer.weight(0, layer.vocabulary))
    after.backward(layer.hidden_gradient(after.detach(), inner))
    expected = dict.fromkeys((unit.name for unit in units), 0.0)
    for block in blocks:
        for slot in block.slots:
            assert slot.linear.weight.grad is not None
            change = slot.linear.weight.detach() - model.checkpoint.tensor(f"{slot.name}.weight")
            expected[slot.unit] += float((slot.linear.weight.grad * change).sum()) / 2
    assert result.parts.numpy() == pytest.approx(np.array(list(expected.values())), rel=1e-3, abs=1e-6)


def unit(name: str, *errors: float) -> Unit:
    levels = [Choice(f"w{bits}", bits * 10, error) for bits, error in zip((2, 3, 4), errors, strict=True)]
    return Unit(name, (name,), 0, "x", 10, tuple(levels))


def seen(genome: tuple[int, ...], parts: list[float], noise: float = 0.0) -> Observation:
    return Observation(genome, np.array(parts), np.full(len(parts), noise), math.fsum(parts))


def test_an_observation_is_the_mean_over_batches_with_its_standard_error() -> None:
    batches = [Sensitivity(10, 4.0, torch.tensor([1.0, math.nan])), Sensitivity(10, 2.0, torch.tensor([3.0, math.nan]))]
    found = observe((1, 0), batches)
    assert found.parts == pytest.approx([0.2, math.nan], nan_ok=True)
    assert found.noise[0] == pytest.approx(0.1)  # 0.1 and 0.3 differ by sqrt(2) standard deviations
    assert found.divergence == pytest.approx(0.3)
    assert math.isinf(observe((1, 0), batches[:1]).noise[0])
    again = Observation.from_json(found.to_json())
    assert again.to_json() == found.to_json()


def test_measured_parts_give_the_other_levels_by_the_ratio_of_output_errors() -> None:
    units = [unit("a", 0.4, 0.1, 0.02), unit("b", 0.4, 0.1, 0.02)]
    found = with_parts(units, [seen((1, 1), [0.5, 0.05])])
    assert [choice.error for choice in found[0].choices] == pytest.approx([2.0, 0.5, 0.1])
    assert [choice.error for choice in found[1].choices] == pytest.approx([0.2, 0.05, 0.01])


def test_a_levels_common_deviation_carries_over_to_units_that_were_not_measured_at_it() -> None:
    units = [unit(str(number), 0.4, 0.1, 0.02) for number in range(21)]
    first = seen((1,) * 21, [0.1] * 21)
    # At 2 bits twice what the ratio of 4 predicts, in all units but the last, which stays at 3 bits.
    second = seen((0,) * 20 + (1,), [0.8] * 20 + [0.1])
    found = with_parts(units, [first, second])
    assert 0.6 < found[20].choices[0].error < 0.8
    assert found[0].choices[0].error == pytest.approx(0.8, rel=0.02)


def test_noise_draws_a_unit_towards_its_other_measurements() -> None:
    units = [unit(str(number), 0.4, 0.1, 0.02) for number in range(10)]
    precise, noisy_ = (
        with_parts(units, [seen((1,) * 10, [0.1] * 10), seen((0,) + (1,) * 9, [1.6] + [0.1] * 9, noise)])
        for noise in (0.0, 1.0)
    )
    assert precise[0].choices[0].error > 1.3
    assert noisy_[0].choices[0].error < 0.9


def test_parts_below_their_noise_stay_positive() -> None:
    found = with_parts([unit("a", 0.4, 0.1, 0.02), unit("b", 0.4, 0.1, 0.02)], [seen((1, 1), [-0.01, 0.3], 0.02)])
    assert found[0].choices[1].error > 0


def test_the_best_candidate_is_measured_next_and_a_repeated_one_ends_the_iteration() -> None:
    # By output errors both are equal; measured, `a` weighs ten times as much.
    units = [unit("a", 0.4, 0.1, 0.02), unit("b", 0.4, 0.1, 0.02)]
    asked = []

    def measure(genome: tuple[int, ...], number: int) -> Observation:
        asked.append((genome, number))
        return seen(genome, [10 * units[0].choices[genome[0]].error, units[1].choices[genome[1]].error])

    found = iterate(units, 60, (1, 1), 5, measure)
    assert asked == [((1, 1), 0), ((2, 0), 1), ((2, 0), 2)]
    assert found[0].choices[0].error == pytest.approx(4.0, rel=0.1)
    assert iterate(units, 60, (1, 1), 1, measure) == with_parts(units, [measure((1, 1), 0)])
