"""Decoding with a target that is divided over two ranks: the tokens of one process, also after the loss of a rank."""

import pytest
import torch

from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.verifiers.auto import Auto
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.cluster.actors.divided_model import TENSOR_PARALLEL, Division
from hasten.cluster.actors.rank_verifier import RankVerifier
from hasten.cluster.actors.verifier import DecodeSpec
from hasten.cluster.programs import decoding_work
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.runtime.placement import ActorResources
from tests.cluster.failing import Die, failing
from tests.cluster.processes import processes, wait_for
from tests.models import tiny

REQUESTS = [Request(f"prompt {number}", row, 12) for number, row in enumerate(tiny.tokens(4, 8).tolist())]


@pytest.fixture(scope="module")
def spec(deepspeed):
    division = Division(2, TENSOR_PARALLEL)
    target = resolve("embedded:target")
    return DecodeSpec(target, 4096, Auto(), PromptLookup(), in_flight=2, draft_length=Fixed(4), division=division)


@pytest.mark.faults
@pytest.mark.ray
def test_a_killed_rank_ends_its_group_whose_prompts_are_decoded_by_another_one(
    spec, ray_session, tmp_path, monkeypatch
):
    torch.set_num_threads(1)
    whole = load_target(spec.target, spec.dtype, path="transformers")
    expected = {result.id: result.token_ids for result in Engine(whole).decode(REQUESTS)}
    # Only rank 1 receives; the first messages are about usage and loading, the others a pass each.
    monkeypatch.setattr(decoding_work, "RankVerifier", failing(RankVerifier, "_receive", 8, Die(tmp_path / "dead")))
    pool = Decoders(spec, workers=1, needs=ActorResources(0.5))
    assert {result.id: result.token_ids for result in pool(REQUESTS)} == expected
    assert (tmp_path / "dead").exists()
    assert pool.restarts == 1
    assert pool.close()["cpu_seconds"] > 0
    wait_for(lambda: not processes("RankVerifier"))


@pytest.mark.ray
def test_a_group_that_is_larger_than_the_cluster_is_refused(spec, ray_session):
    with pytest.raises(UserError, match=r"workers=1 of target_group.size=2 and threads=1 need 2000 CPUs"):
        Decoders(spec, workers=1, needs=ActorResources(1000)).prepare()
