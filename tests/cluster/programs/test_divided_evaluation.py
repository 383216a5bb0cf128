"""An evaluation on a group whose rank is killed: the same figures, from another group."""

import pytest
import torch

from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.divided_model import ZERO3, Division
from hasten.cluster.actors.rank_evaluator import RankEvaluator
from hasten.cluster.programs import evaluation_groups
from hasten.cluster.programs.evaluation import measure
from hasten.cluster.runtime.placement import ActorResources
from tests.cluster.failing import Die, failing
from tests.cluster.processes import processes, wait_for
from tests.models import tiny


@pytest.mark.soak
@pytest.mark.faults
@pytest.mark.ray
def test_a_killed_rank_ends_its_group_and_the_windows_are_evaluated_again(
    tmp_path, monkeypatch, deepspeed, ray_session
):
    torch.set_num_threads(1)
    folder, cut = tiny.save(tmp_path / "m", "llama"), windows(tiny.tokens(6, 12), 12)
    # The other rank waits for the killed one's part of a weight.
    faulty = failing(RankEvaluator, "evaluate", 1, Die(tmp_path / "dead"))
    monkeypatch.setattr(evaluation_groups, "RankEvaluator", faulty)
    measured = measure(folder, None, cut, 1, ActorResources(0.5), division=Division(2, ZERO3))
    assert (tmp_path / "dead").exists()
    model = Architecture(Checkpoint(folder))
    assert measured.sums == sum((evaluate(model, cut.part(rank, 2)) for rank in range(2)), Sums())
    assert measured.cpu_seconds > 0
    wait_for(lambda: not processes("RankEvaluator"))
