import dataclasses
import signal

import pytest
import torch

from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.hierarchy import Hierarchy
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.decoding.verifiers.speculative_sampling import SpeculativeSampling
from hasten.accel.errors import UserError
from hasten.cluster.actors.verifier import DecodeSpec, VerifierActor, sharing_refusal
from hasten.cluster.programs import decoding, decoding_work
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.decoding_work import DecodeWorkload
from hasten.cluster.programs.shared_drafters import SharedDrafters
from hasten.cluster.runtime import placement
from hasten.cluster.runtime.placement import ActorResources
from tests.cluster.failing import Die, failing, no_stragglers  # noqa: F401
from tests.cluster.processes import processes
from tests.models import tiny

REQUESTS = [Request(f"prompt {number}", row, 12 + number) for number, row in enumerate(tiny.tokens(12, 8).tolist())]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A tiny target with a drafter that learns; drafts of fixed size."""
    source = tiny.save(tmp_path_factory.mktemp("decoding") / "target", "llama")
    return DecodeSpec(source, tiny.VOCABULARY, SampleAndMatch(), TokenRecycling(), in_flight=2, draft_length=Fixed(8))


@pytest.fixture(scope="module")
def expected(spec):
    """Completions that one process decodes plainly, by id."""
    torch.set_num_threads(1)
    engine = Engine(load_target(spec.target, spec.dtype))
    return {result.id: result.token_ids for result in engine.decode(REQUESTS)}


def ids(results):
    """Completions by id, of results that are each there once."""
    found = {result.id: result.token_ids for result in results}
    assert len(found) == len(results)
    return found


def known(learned):
    """Tokens that the drafter knows a successor of."""
    return int((learned["successors"][:, 0] >= 0).sum())


@pytest.mark.ray
def test_verifiers_share_the_prompts_and_a_drafter_where_a_round_trip_pays(spec, expected, ray_session, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_ROUND_TRIP", float("inf"))
    pool = Decoders(spec, workers=2)
    results = list(pool(REQUESTS))
    assert ids(results) == expected
    assert pool.shared
    assert sum(result.stats.num_draft_tokens for result in results) > 0
    assert known(pool.learned()) > 10
    assert 0 < pool.target_efficiency(8) < 2
    used = pool.close()
    assert used["cpu_seconds"] > 0
    assert used["peak_rss_bytes"] > 0
    assert pool.restarts == 0


@pytest.mark.ray
@pytest.mark.usefixtures("no_stragglers", "ray_session")
def test_prompts_of_a_verifier_that_dies_before_its_second_result_end_once(spec, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding_work, "VerifierActor", failing(VerifierActor, "decode", 2, Die(tmp_path / "dead")))
    monkeypatch.setattr(decoding, "_MAX_ROUND_TRIP", 0.0)
    pool = Decoders(spec, workers=2)
    assert ids(list(pool(REQUESTS))) == expected
    assert not pool.shared, "a round trip costs too much"
    assert pool.restarts == 1
    pool.close()


@pytest.mark.ray
def test_a_killed_drafter_is_replaced_and_knows_what_it_had_learned(spec, expected, ray_session):
    pool = Decoders(spec, workers=1, placement="shared")
    assert ids(list(pool(REQUESTS))) == expected
    before = known(pool.learned())
    processes("DrafterActor")[0].send_signal(signal.SIGKILL)
    for _ in range(100):
        results = list(pool(REQUESTS[:3]))
        assert ids(results) == {each.id: expected[each.id] for each in REQUESTS[:3]}
        if pool.restarts and any(result.stats.num_draft_tokens for result in results):
            break
    assert pool.restarts == 1
    assert known(pool.learned()) >= before
    pool.close()


def test_drawn_drafts_are_not_shared_with_a_verifier_that_reads_their_distributions(spec):
    drawn = dataclasses.replace(spec, drafter=DraftModel(), verifier=SpeculativeSampling())
    assert "needs their distributions, which a shared drafter does not send" in sharing_refusal(drawn, Sampling(0.5))
    assert sharing_refusal(drawn, Sampling()) is None
    assert sharing_refusal(dataclasses.replace(drawn, verifier=SampleAndMatch()), Sampling(0.5)) is None


@pytest.mark.ray
def test_gpus_that_are_not_there_are_refused_and_not_waited_for(spec, ray_session):
    with pytest.raises(UserError, match=r"workers=2 of threads=1 need 1 CPU and 1000 GPUs each"):
        Decoders(spec, workers=2, needs=ActorResources(1, 1000)).prepare()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_shared_drafters_with_a_model_count_among_the_gpus(spec, monkeypatch):
    monkeypatch.setattr(decoding, "nodes", lambda: [{"CPU": 4.0, "GPU": 2.0}])
    monkeypatch.setattr(placement, "nodes", decoding.nodes)
    monkeypatch.setattr(placement, "grows", lambda: False)
    hierarchy = dataclasses.replace(spec, drafter=Hierarchy(TokenRecycling()))
    needs = {"needs": ActorResources(1, 1), "drafter_needs": ActorResources(1, 1)}
    started = []
    monkeypatch.setattr(SharedDrafters, "_start", lambda pool, number, cpus: started.append(number))
    monkeypatch.setattr(DecodeWorkload, "_start", lambda pool, worker, cpus: _stop())
    monkeypatch.setattr(Decoders, "close", lambda pool: None)
    with pytest.raises(StopIteration):
        Decoders(hierarchy, workers=2, **needs).prepare()
    assert started == [], "two verifiers have both GPUs"
    with pytest.raises(UserError, match=r"4 CPUs and 2 GPUs; workers=2 .* drafter_actors=1 need 3 CPUs and 3 GPUs"):
        Decoders(hierarchy, workers=2, placement="shared", **needs).prepare()


def _stop():
    raise StopIteration
