"""Gradient scores against autograd on the whole model of transformers."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.search.gradient_scores import GradientScorePass
from tests.compression.search.noisy import LENGTH, TOKENS, architecture, layer_units, noisy, part_units
from tests.models import tiny

BATCHES = [[0, 1], [3]]


def by_transformers(folder: Path, batch: list[int]) -> dict[tuple[str, str], float]:
    """Scores by layer and level, from all inputs and output gradients of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weight, seen = noisy(architecture(folder)), dict[str, list[Tensor]]()

    def watch(name: str) -> None:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = [inputs[0].detach(), output]

        model.get_submodule(name).register_forward_hook(forward)

    streamed = architecture(folder)
    layers = [layer.name for index in range(streamed.num_blocks) for layer in streamed.linears(index)]
    for name in layers:
        watch(name)
    with torch.enable_grad():
        log_probs = model(input_ids=TOKENS[batch]).logits[:, :-1].log_softmax(-1)
        (-log_probs.gather(-1, TOKENS[batch][:, 1:, None]).sum()).backward()
    scores = {}
    for name in layers:
        inputs, output = seen[name]
        for level in ("coarse", "fine"):
            change = inputs @ (weight(name, level) - model.get_submodule(name).weight.detach()).T
            assert output.grad is not None
            scores[name, level] = float((change * output.grad).square().sum())
    return scores


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_score_is_the_squared_gradient_times_the_squared_change_of_the_output(tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path / "model", family)
    model = architecture(folder)
    units = [*layer_units(model), *part_units(2)]
    measured = GradientScorePass(model, units, noisy(model), TOKENS).measure(BATCHES)
    for batch, result in zip(BATCHES, measured, strict=True):
        expected = by_transformers(folder, batch)
        assert result.tokens == len(batch) * (LENGTH - 1)
        for unit, values in zip(units, result.values, strict=True):
            for choice, value in zip(unit.choices, values, strict=True):
                known = [expected[name, choice.level] for name in unit.layers if choice.level != KEEP]
                assert value == pytest.approx(math.fsum(known), rel=1e-3)


def test_more_noise_has_a_higher_score(tmp_path: Path) -> None:
    model = architecture(tiny.save(tmp_path / "model", "llama"))
    units = layer_units(model)
    (result,) = GradientScorePass(model, units, noisy(model), TOKENS).measure([[0, 1, 2]])
    assert all(coarse > fine > kept == 0.0 for coarse, fine, kept in result.values)
