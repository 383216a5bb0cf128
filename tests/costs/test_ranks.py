"""Memory and traffic of divided models, worked out by hand for two blocks of hidden size 64 in float32."""

import pytest
import torch

from hasten.accel.costs import decoding
from hasten.accel.costs.ranks import Ranks
from hasten.accel.models.assembled import WholeModel
from tests.costs.rates import RATES

# Queries and outputs 64 * 64 each, keys and values 32 * 64 each, three matrices of 64 * 128, and two norms.
BLOCK = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64)


def test_a_tensor_parallel_rank_has_its_part_of_the_blocks_and_all_of_the_rest(model):
    outside = 4 * model.elements() - 2 * BLOCK
    assert Ranks(2).weights(model) == ({"weights": BLOCK + outside}, {})


def test_a_zero3_rank_has_its_part_of_everything_and_collects_two_blocks(model):
    everything = 4 * model.elements()
    collected = {"collected weights": 2 * BLOCK + everything - 2 * BLOCK}
    assert Ranks(4, collects=True).weights(model) == ({"weights": everything // 4} | collected, {})
    assert Ranks(4, True, "cpu").weights(model) == (collected, {"weights": everything // 4})
    assert Ranks(4, True, "/nvme").weights(model) == (collected, {"read from disk": 2 * BLOCK // 4})


def test_the_rest_is_what_deepspeed_is_told(model):
    sizes = WholeModel(model.architecture.checkpoint, torch.float32).sizes()
    assert 4 * sizes.block == BLOCK
    assert 4 * (sizes.outside + 2 * sizes.block) == 4 * model.elements()


def test_a_pass_sends_two_sums_a_block_or_all_weights(model):
    # In a ring of n, each sum crosses 2 (n - 1) links in total.
    assert Ranks(2).moved(model, rows=3) == 2 * (2 * 2) * 3 * 64 * 4
    assert Ranks(3).moved(model, rows=3) == 4 * (2 * 2) * 3 * 64 * 4
    assert Ranks(3, collects=True).moved(model, rows=3) == 2 * 4 * model.elements()


@pytest.mark.parametrize(("ranks", "share"), [(Ranks(2), 2), (Ranks(2, collects=True), 1)])
def test_a_plan_has_a_process_a_rank_with_its_share_of_the_caches_and_of_the_time(model, ranks, share):
    def planned(ranks):
        one = decoding.Decoding(model, 4, 8.0, 24, 8, drafted=7, in_flight=3, fast=False, ranks=ranks)
        return decoding.estimate(one, RATES)

    whole, divided = planned(None), planned(ranks)
    assert divided.processes[0].count == 2
    caches = [estimate.processes[0].host["decode"]["caches"] for estimate in (whole, divided)]
    assert caches[0] == share * caches[1]
    seconds = [next(step.seconds for step in estimate.steps if step.name == "decode") for estimate in (whole, divided)]
    assert seconds[0] == pytest.approx(share * seconds[1])
    assert divided.moved["between ranks"] > ranks.moved(model, 1)
    assert "2 ranks of a group" in divided.notes[0]
