"""AutoRound: rounding and scales of a block's layers, learned on the block's output."""

import pytest
import torch

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.autoround import AutoRound
from hasten.accel.compression.transforms.gptaq import GPTAQ
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from tests.compression import local
from tests.compression.trained import target_model
from tests.models import tiny

TOKENS = tiny.tokens(batch=6, length=16)


def text(sequences):
    import transformers

    from hasten.accel.data.tokens import load_tokens

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    return load_tokens("library", tokenizer, sequences, 32)


@pytest.fixture(scope="module")
def block():
    """The first block of the embedded target, with inputs and outputs on real text."""
    model = target_model()
    inputs = model.embed(text(8))
    return model, inputs, model.run_block(model.load_block(0), 0, inputs)


def error(model, level, weights, inputs, targets):
    """Mean squared error of the block's outputs with compressed weights."""
    module = model.load_block(0)
    modules = {layer.name: layer.module for layer in model.linears(0)}
    model.replace_weights(module, ((modules[name], level.dense(weight)) for name, weight in weights.items()))
    return float((model.run_block(module, 0, inputs) - targets).square().mean())


def rounded(model, level, groups):
    method = RoundToNearest()

    def read(layer):
        return model.checkpoint.tensor(f"{layer.name}.weight")

    results = {}
    for group in groups:
        results |= level.solve(method, group.layers, read, method.prepare(None), "cpu")
    return {name: result.weight for name, result in results.items()}


@pytest.mark.parametrize(
    ("name", "share"), [("w3g32a", 0.75), ("w2g32", 0.5), ("nvfp4a16", 0.75), ("mxfp4a16", 0.75), ("fp8_block", 0.95)]
)
def test_the_error_of_the_blocks_output_falls_below_that_of_rounding_to_nearest(name, share, block):
    model, inputs, targets = block
    level = parse_level(name)
    groups = make_layer_groups(model, level, (), 0, 0)[0]
    before = error(model, level, rounded(model, level, groups), inputs, targets)
    steps = 25 if name in ("w2g32", "nvfp4a16") else 12
    solved = AutoRound(steps, batch=4).solve_block(model, 0, groups, RoundToNearest(), inputs, targets)
    weights = {key: result.weight for key, result in solved.items()}
    assert error(model, level, weights, inputs, targets) < share * before
    for key, result in solved.items():
        torch.testing.assert_close(level.unpack(level.pack(result.weight)), level.dense(weights[key]), rtol=0, atol=0)


def test_codes_are_next_to_the_weights_where_scales_are_fixed(block):
    model, inputs, targets = block
    level = parse_level("mxfp4a16")
    groups = make_layer_groups(model, level, (), 0, 0)[0]
    solved = AutoRound(steps=12, batch=4).solve_block(model, 0, groups, RoundToNearest(), inputs, targets)
    start = rounded(model, level, groups)
    moved = 0
    for name, result in solved.items():
        assert torch.equal(result.weight.scale, start[name].scale)
        scale = level.grid.scales(result.weight.scale).repeat_interleave(32, 1)
        values = model.checkpoint.tensor(f"{name}.weight").float() / scale
        # Steps of e2m1 are at most 2, so a neighbour is less than 2 away.
        assert float((level.dense(result.weight).float() / scale - values.clamp(-6, 6)).abs().max()) < 2
        moved += int((result.weight.codes != start[name].codes).sum())
    assert moved


def test_rounding_is_kept_where_nothing_improves_it(block):
    model, inputs, targets = block
    level = parse_level("w4g32")
    groups = make_layer_groups(model, level, (), 0, 0)[0]
    solved = AutoRound(steps=1, batch=8, rate=1e-9).solve_block(model, 0, groups, RoundToNearest(), inputs, targets)
    for name, weight in rounded(model, level, groups).items():
        assert torch.equal(solved[name].weight.codes, weight.codes)
        assert torch.equal(solved[name].weight.scale, weight.scale)


def test_facts_have_the_error_of_each_layers_output(tmp_path):
    source = tiny.save(tmp_path / "original", "mixtral")
    chosen = local.settings(source, tmp_path / "out", RoundToNearest(), transforms=(AutoRound(steps=3, batch=2),))
    rows = local.compress(chosen, TOKENS)
    assert {row["method"] for row in rows} == {"AutoRound"}
    assert {row["error_of"] for row in rows} == {"output"}
    assert len(rows) == 2 * (4 + 4 * 3)
    assert all(0 <= row["error"] < 1 for row in rows)


def test_it_does_not_go_with_targets_of_layers_levels_without_a_grid_or_calibrated_inputs(tmp_path):
    source = tiny.save(tmp_path / "original", "llama")

    def settings(*transforms, **changes):
        return local.settings(source, tmp_path / "out", GPTQ(), transforms=transforms, **changes)

    with pytest.raises(UserError, match="autoround does not go with gptaq"):
        local.compress(settings(GPTAQ(), AutoRound()), TOKENS)
    with pytest.raises(UserError, match=r"transforms=\[autoround\] rounds to grids, which level s50 has not"):
        settings(AutoRound(), level=parse_level("s50"), pruner=Magnitude())
    with pytest.raises(UserError, match=r"collects no scales of inputs, which level w8a8s needs"):
        settings(AutoRound(), level=parse_level("w8a8s"))
    with pytest.raises(UserError, match="makes one level, not a database of levels: use hasten compress"):
        settings(AutoRound(), levels=(parse_level("w4g32"),), level=parse_level("w4g32"))
