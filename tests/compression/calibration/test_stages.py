import gc
import weakref

import pytest
import torch

from hasten.accel.compression.calibration import stages
from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.stages import stages_of
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

TOKENS = tiny.tokens(batch=5)
CHUNKS = dict(enumerate(TOKENS.tensor_split(2)))


def save(path, family):
    # All blocks are mixtures.
    changes = {"decoder_sparse_step": 1} if family == "qwen3_moe" else {}
    return tiny.save(path, family, **changes)


@pytest.fixture(scope="module", params=[*tiny.FAMILIES])
def model(request, tmp_path_factory):
    return Architecture(Checkpoint(save(tmp_path_factory.mktemp(request.param) / "m", request.param)))


def groups_of(model, ignore=()):
    return make_layer_groups(model, parse_level("w8"), ignore, 0, 0)[0]


def changed(block, stage):
    """Other weights for the layers of a stage, by path: halves of the original ones."""
    return {layer.module: block.get_submodule(layer.module).weight / 2 for group in stage for layer in group.layers}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, tree in found.items():
        assert tree.nodes.keys() == expected[key].nodes.keys()
        for node, total in tree.nodes.items():
            assert total.tokens == expected[key].nodes[node].tokens
            assert (total.array() == expected[key].nodes[node].array()).all()


def test_each_stage_is_collected_behind_the_replaced_weights_of_the_stages_before_it(model):
    groups = groups_of(model)
    plain, block = model.load_block(0), model.load_block(0)
    shard = Shard(model, CHUNKS, batch=2)
    staged = shard.begin(block, groups)
    assert sorted(group.key for stage in staged.stages for group in stage) == sorted(group.key for group in groups)
    for number, stage in enumerate(staged.stages):
        expected = Shard(model, CHUNKS, batch=2).collect(plain, stage)
        same(staged.collect(number, [group.key for group in stage]), expected)
        weights = changed(plain, stage)
        staged.replace(weights.items())
        model.replace_weights(plain, weights.items())
    shard.finish()
    again = Shard(model, CHUNKS, batch=2)
    again.advance(plain)
    assert shard.position == again.position == 1
    second, other = model.load_block(1), model.load_block(1)
    later = make_layer_groups(model, parse_level("w8"), (), 0, 0)[1]
    same(shard.collect(second, later), again.collect(other, later))


def test_stages_that_were_solved_before_are_passed_without_collecting(model):
    groups = groups_of(model)
    plain, block = model.load_block(0), model.load_block(0)
    staged = Shard(model, CHUNKS, batch=2).begin(block, groups)
    *before, last = staged.stages
    for stage in before:
        weights = changed(plain, stage)
        staged.replace(weights.items())
        model.replace_weights(plain, weights.items())
    keys = [group.key for group in last]
    same(staged.collect(len(before), keys), Shard(model, CHUNKS, batch=2).collect(plain, last))


def test_the_inputs_of_the_current_stage_are_held_but_those_of_experts_and_of_earlier_stages_are_not(model):
    groups = groups_of(model)
    block = model.load_block(0)
    staged = Shard(model, CHUNKS, batch=2).begin(block, groups)
    for number, stage in enumerate(staged.stages):
        keys = [group.key for group in stage]
        first = staged.collect(number, keys)
        if stage[0].is_expert:
            assert not staged.can_collect(number)
        else:
            assert staged.can_collect(number)
            same(staged.collect(number, keys), first)
        assert not number or not staged.can_collect(number - 1)
        staged.replace(changed(block, stage).items())


def test_a_finished_block_is_freed_without_the_garbage_collector(model):
    shard = Shard(model, CHUNKS, batch=2)
    block = model.load_block(0)
    staged = shard.begin(block, groups_of(model))
    for number, stage in enumerate(staged.stages):
        staged.collect(number, [group.key for group in stage])
        staged.replace(changed(block, stage).items())
    weight = weakref.ref(block.get_submodule(staged.stages[0][0].layers[0].module).weight)
    gc.collect()
    gc.disable()
    try:
        shard.finish()
        del staged, block, stage
        assert weight() is None
    finally:
        gc.enable()


def test_a_block_whose_groups_are_in_another_order_is_refused(model):
    groups = groups_of(model)
    backwards = [group for stage in reversed(stages_of(groups)) for group in stage]
    staged = Shard(model, CHUNKS, batch=2).begin(model.load_block(0), backwards)
    with pytest.raises(RuntimeError, match="before"):
        staged.collect(0, [])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_experts_of_a_layer_are_one_stage(family, tmp_path):
    stages = stages_of(groups_of(Architecture(Checkpoint(save(tmp_path / family, family)))))
    assert [len(stage) for stage in stages] == [1, 1, 2 * 4]
    assert [stage[0].is_expert for stage in stages] == [False, False, True]


def test_experts_of_a_layer_are_collected_alike_in_one_stage_or_in_several(tmp_path, monkeypatch):
    model = Architecture(Checkpoint(save(tmp_path, "mixtral")))
    groups = groups_of(model)
    whole = Shard(model, CHUNKS, batch=2)
    together = whole.begin(model.load_block(0), groups)
    monkeypatch.setattr(stages, "_STAGE_BYTES", 1)
    parts = Shard(model, CHUNKS, batch=2)
    apart = parts.begin(model.load_block(0), groups)
    (number,) = [number for number, stage in enumerate(together.stages) if stage[0].is_expert]
    # One expert a stage: its layers are calibrated at the same time.
    assert [len(stage) for stage in apart.stages[number:]] == [2] * 4
    plain = model.load_block(0)
    for shard in (together, apart):
        for stage in shard.stages[:number]:
            shard.replace(changed(plain, stage).items())
    expected = together.collect(number, [group.key for group in together.stages[number]])
    together.replace(changed(plain, together.stages[number]).items())
    found = {}
    for place in range(number, len(apart.stages)):
        found |= apart.collect(place, [group.key for group in apart.stages[place]])
        apart.replace(changed(plain, apart.stages[place]).items())
    same(found, expected)
    whole.finish()
    parts.finish()
    for chunk, states in whole._hidden.items():
        assert all(map(torch.equal, states, parts._hidden[chunk]))
