"""Blocks that are divided over ranks run as in one process, bit for bit."""

import gc
import weakref
from functools import partial

import pytest
import torch

from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.quarot import QuaRot
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.divided import DividedArchitecture
from hasten.accel.models.forwards import Forward
from tests.compression import local
from tests.models import tiny
from tests.models.block_runs import at_once, in_stages
from tests.models.ranks import on_ranks

TOKENS = tiny.tokens(batch=5)
# By rank: they have different numbers of chunks and of forwards. Two forwards of a chunk reach different experts.
CHUNKS = [{0: TOKENS[:2], 1: TOKENS[2:3]}, {2: TOKENS[3:]}, {}]


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "rotated"])
def folder(request, tmp_path_factory):
    """A checkpoint of each family, and one whose layers rotate and round their inputs."""
    if request.param == "rotated":
        path = tmp_path_factory.mktemp("rotated")
        level, transforms = parse_level("w8a8"), (QuaRot(online=True),)
        source = tiny.save(path / "original", "llama")
        local.compress(local.settings(source, path / "m", RoundToNearest(), level=level, transforms=transforms), TOKENS)
        return path / "m"
    changes = {"decoder_sparse_step": 1} if request.param == "qwen3_moe" else {}
    return tiny.save(tmp_path_factory.mktemp(request.param) / "m", request.param, **changes)


def divided(folder, exchange, **changes):
    return DividedArchitecture(Checkpoint(folder), torch.float32, "cpu", exchange, **changes)


@pytest.mark.parametrize("run", [in_stages, at_once])
def test_sums_and_states_on_ranks_with_different_numbers_of_forwards_are_those_of_one_process(folder, run):
    results = on_ranks(3, lambda exchange: run(divided(folder, exchange), folder, CHUNKS[exchange.rank]))
    for chunks, (found, hidden) in zip(CHUNKS, results, strict=True):
        expected, states = run(Architecture(Checkpoint(folder)), folder, chunks)
        assert found == expected
        assert hidden.keys() == states.keys()
        assert all(torch.equal(hidden[number], states[number]) for number in states)


def test_a_rank_holds_its_share_of_the_layers_and_a_weight_is_sent_once_for_all_forwards(folder):
    whole = Architecture(Checkpoint(folder))
    layers = whole.linears(0)

    def run(exchange):
        model = divided(folder, exchange)
        block = model.load_block(0)
        hidden = model.embed(TOKENS)
        forwards = [Forward(partial(model.run_block, block, 0, part)) for part in hidden.split(1)]
        with torch.no_grad():
            model.run_forwards(block, forwards)
        names = {f"{layer.module}.weight" for layer in layers}
        kept = {path: weight.numel() for path, weight in block.named_parameters() if path in names}
        weights = model._weights[block]
        weights.replace(layers[0].module, torch.ones(layers[0].rows, layers[0].columns))
        stored = sum(part.untyped_storage().nbytes() for part in weights._parts)
        return weights.nbytes, stored, kept, exchange.gathered

    for nbytes, stored, kept, gathered in on_ranks(2, run):
        assert stored == nbytes
        assert nbytes == sum(layer.rows * layer.columns for layer in layers) * 4 / 2
        assert not any(kept.values())
        # Without an expert that no token reached.
        assert gathered <= len(layers)
        assert gathered >= sum(layer.expert is None for layer in layers)


def test_a_divided_block_does_not_run_alone_and_is_freed_without_the_garbage_collector(tmp_path):
    folder = tiny.save(tmp_path / "m", "llama")

    def run(exchange):
        model = divided(folder, exchange, offload=True)
        block = model.load_block(0)
        with pytest.raises(RuntimeError, match="only runs in run_forwards"):
            model.run_block(block, 0, model.embed(TOKENS))
        forward = Forward(partial(model.run_block, block, 0, model.embed(TOKENS)))
        model.run_forwards(block, [forward])
        gone = weakref.ref(block)
        del block, forward
        return gone() is None

    gc.collect()
    gc.disable()
    try:
        assert on_ranks(1, run) == [True]
    finally:
        gc.enable()
