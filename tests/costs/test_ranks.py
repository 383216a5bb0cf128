"""Memory and traffic of divided models, worked out by hand for two blocks of hidden size 64 in float32."""

import pytest
import torch

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.costs import compression, decoding, evaluation
from hasten.accel.costs.compression import BETWEEN_RANKS, Pass
from hasten.accel.costs.evaluation import Windows
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


def test_a_rank_that_runs_one_block_has_its_part_of_it_and_collects_the_largest_layer(model):
    norms, layer = 4 * 2 * 64, 4 * 64 * 128
    part = (BLOCK - norms) // 4
    assert Ranks(4, collects=True).block_weights(model) == (
        {"weights of a block": part + norms, "collected layer": layer},
        {},
    )
    assert Ranks(4, True, "cpu").block_weights(model) == (
        {"weights of a block": norms, "collected layer": layer},
        {"offloaded weights of a block": part},
    )
    assert Ranks(4).block_weights(model) == ({"weights of a block": part + norms}, {"block as it is loaded": BLOCK})
    assert Ranks(4, collects=True).block_moved(model, 0, rows=7) == 3 * (BLOCK - norms)
    assert Ranks(2).block_moved(model, 0, rows=3) == Ranks(2).moved(model, rows=3) // 2


@pytest.mark.parametrize(("staged", "runs"), [(True, 2), (False, 3)])
def test_a_planned_calibration_sends_every_layer_once_for_each_run_of_its_block(model, staged, runs):
    groups = make_layer_groups(model.architecture, parse_level("w4g32"), (), 0, 0)

    def planned(workers, ranks):
        return compression.estimate(
            Pass(model, groups, [GPTQ()], 8, 16, workers=workers, staged=staged, ranks=ranks), RATES
        )

    ranks = Ranks(2, collects=True)
    whole, divided = planned(4, None), planned(4, ranks)
    assert divided.processes[0].count == whole.processes[0].count == 4
    # Two groups; without stages, all blocks but the last run twice.
    assert divided.moved[BETWEEN_RANKS] == 2 * runs * ranks.block_moved(model, 0, 0)
    weights = [estimate.processes[0].host["collect"]["weights of a block"] for estimate in (whole, divided)]
    assert weights[1] == weights[0] // 2 + 4 * 64
    loads = [next(step.cpu_seconds for step in estimate.steps if step.name == "load") for estimate in (whole, divided)]
    assert loads[0] == pytest.approx(2 * loads[1])


@pytest.mark.parametrize("ranks", [Ranks(2), Ranks(2, collects=True)])
def test_a_planned_evaluation_has_the_ranks_of_every_worker(model, ranks):
    one, two = (
        evaluation.estimate(model, Windows(8, 16), RATES, model, workers=2, ranks=each) for each in (None, ranks)
    )
    assert [estimate.processes[0].count for estimate in (one, two)] == [2, 4]
    assert two.moved["between ranks"] == 2 * 2 * 2 * ranks.block_moved(model, 0, 4 * 16)
    states = [estimate.processes[0].host["embed"]["hidden states"] for estimate in (one, two)]
    assert states[0] == states[1] * (2 if ranks.collects else 1)
