"""Runs of blocks for statistics, whose results must not depend on where the weights are."""

import torch

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.models.checkpoint import Checkpoint


def changed(folder, block, stage):
    """Other weights for the layers of a stage: halves of the original ones."""
    names = [(layer.module, f"{layer.name}.weight") for group in stage for layer in group.layers]
    return ((path, Checkpoint(folder).tensor(name).float() / 2) for path, name in names)


def sums(trees):
    return {
        key: {node: (total.tokens, total.array().tobytes()) for node, total in tree.nodes.items()}
        for key, tree in trees.items()
    }


@torch.no_grad()
def in_stages(model, folder, chunks, stream=False):
    """Sums of all stages of the first block, each behind replaced weights, and the hidden states after it.

    stream: whether experts are read when they run.
    """
    groups = make_layer_groups(model, parse_level("w8"), (), 0, 0)[0]
    shard = Shard(model, chunks, batch=1)
    staged = shard.begin((model.stream_block if stream else model.load_block)(0), groups)
    found = []
    for number, stage in enumerate(staged.stages):
        found.append(sums(staged.collect(number, [group.key for group in stage])))
        staged.replace(changed(folder, 0, stage))
    shard.finish()
    return found, {number: torch.cat(parts) for number, parts in shard._hidden.items()}


@torch.no_grad()
def at_once(model, folder, chunks, stream=False):
    """Sums of all groups of both blocks, of which the second one stops early, and the hidden states between them."""
    load = model.stream_block if stream else model.load_block
    groups = make_layer_groups(model, parse_level("w8"), (), 0, 0)
    shard = Shard(model, chunks, batch=1)
    found = [sums(shard.collect(load(0), groups[0], advance=True))]
    hidden = {number: torch.cat(parts) for number, parts in shard._hidden.items()}
    found.append(sums(shard.collect(load(1), groups[1][:2])))
    return found, hidden
