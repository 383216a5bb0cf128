"""GPTAQ: the target of a layer, by brute force, and the statistics that it is made of."""

import torch

from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.transforms.base import target_change
from hasten.accel.compression.transforms.gptaq import GPTAQ
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression.calibration.test_stages import CHUNKS, groups_of
from tests.models import tiny


def test_the_target_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(200, 6, generator=generator)
    inputs = original + 0.3 * torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(3, 6, generator=generator)
    hessian = Hessian(6)
    hessian.add(inputs)
    hessian.add_shift(inputs, original)
    change = target_change([GPTAQ(strength=1.0, damping=1e-9)], hessian)
    # The weight whose outputs for the inputs are nearest to the original outputs.
    expected = torch.linalg.lstsq(inputs.double(), original.double() @ weight.double().T).solution.T
    torch.testing.assert_close(weight + weight @ change, expected.float(), rtol=1e-4, atol=1e-4)
    half = target_change([GPTAQ(strength=0.5, damping=1e-9)], hessian)
    torch.testing.assert_close(half, change / 2)


def test_the_shift_is_that_of_the_original_models_inputs(tmp_path):
    model = Architecture(Checkpoint(tiny.save(tmp_path / "model", "llama")))
    groups, block = groups_of(model), model.load_block(0)
    seen = {}

    def watch(module, name, inputs):
        seen.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    shard = Shard(model, CHUNKS, batch=2, original=True)
    staged = shard.begin(block, groups, lambda: model.load_block(0))
    total = {}
    changed = [
        (layer.module, block.get_submodule(layer.module).weight + 0.05) for group in groups for layer in group.layers
    ]
    for stage, (group,) in enumerate(staged.stages):
        total |= {key: tree.total() for key, tree in shard.collect_stage(stage, [group.key]).items()}
        staged.replace([(path, weight) for path, weight in changed if path in {layer.module for layer in group.layers}])
    shard.finish()
    for kind in ("plain", "changed"):
        one = model.load_block(0)
        if kind == "changed":
            model.replace_weights(one, changed)
        for group in groups:
            module = one.get_submodule(group.layers[0].module)
            name = (kind, group.key)
            module.register_forward_pre_hook(lambda module, inputs, name=name: watch(module, name, inputs))
        Shard(model, CHUNKS, batch=2).advance(one)
    for group in groups:
        inputs, original = torch.cat(seen["changed", group.key]), torch.cat(seen["plain", group.key])
        expected = (original - inputs).T @ inputs
        torch.testing.assert_close(total[group.key].shift, expected, rtol=1e-3, atol=1e-3)
