"""A drafter behind a connection, in this process: what travels, and that it is the same drafter."""

import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.combined.union import Union
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.hierarchy import Hierarchy
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.cluster.actors.drafter import Address, Begin, DrafterActor, Observed, ObservedPrompt, PlainTree
from hasten.cluster.actors.remote_drafter import Connection, RemoteDrafter
from tests.models import tiny

REQUESTS = [Request(str(number), row, 24) for number, row in enumerate(tiny.tokens(4, 10).tolist())]
BOTH = Union((PromptLookup(), TokenRecycling(prompt_tokens=4)))


class Line:
    """The actor as its handle: calls go through pickle. dead: whether it is lost; still: whether it does nothing."""

    def __init__(self, drafter):
        memory = drafter.new_memory(Models(tiny.VOCABULARY))
        self.actor = DrafterActor(drafter, lambda: memory)
        self.actor.prepare()
        self.calls = []
        self.dead = self.still = False

    def __getattr__(self, name):
        def remote(*arguments):
            self.calls.append(pickle.dumps(arguments))
            sent, made = self.calls[-1], []

            def answer():
                if self.dead:
                    raise ray.exceptions.ActorDiedError
                if self.still:
                    raise ray.exceptions.GetTimeoutError
                # Once, however often it is asked for.
                made[:] = made or [getattr(self.actor, name)(*pickle.loads(sent))]
                return made[0]

            if name == "forget":  # nobody gets what is only said
                answer()
            return answer

        return SimpleNamespace(remote=remote)


@pytest.fixture
def line(monkeypatch):
    """An actor with the union, the one that every connection finds."""
    found = SimpleNamespace(handle=Line(BOTH))
    monkeypatch.setattr(ray, "get", lambda call, timeout=None: pickle.loads(pickle.dumps(call())))
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([], calls) if found.handle.still else (calls, []))
    monkeypatch.setattr(ray, "get_actor", lambda name: found.handle)
    # Nobody gets what is only said.
    original = Connection.flush

    def flush(self):
        events, handle = list(self._events), self._handle
        original(self)
        if handle is not None and not handle.dead and not handle.still:
            handle.actor.serve(self._client, events, [], 0)

    monkeypatch.setattr(Connection, "flush", flush)
    return found


def decoded(drafter, memory=None, policy=None, in_flight=2):
    torch.set_num_threads(1)
    engine = Engine(
        TransformersTarget(tiny.build("llama")),
        drafter,
        models=Models(tiny.VOCABULARY),
        memory=memory,
        policy=policy or Fixed(8),
        in_flight=in_flight,
    )
    results = {result.id: result for result in engine.decode(REQUESTS)}
    return {key: result.token_ids for key, result in results.items()}, results, engine.memory


def test_a_remote_drafter_drafts_and_learns_what_it_would_in_place(line):
    here, results, memory = decoded(BOTH)
    there, remote_results, _ = decoded(RemoteDrafter(BOTH), Connection(Address("name"), "0"))
    assert there == here
    for key, result in results.items():
        assert remote_results[key].stats.acceptance_histogram == result.stats.acceptance_histogram
        assert remote_results[key].stats.num_draft_tokens == result.stats.num_draft_tokens
    expected = BOTH.saved(memory)
    learned = line.handle.actor.learned()
    assert learned.keys() == expected.keys()
    assert all(torch.equal(learned[name], expected[name]) for name in expected)
    assert not line.handle.actor._sequences


def test_a_remote_drafter_learns_the_target_after_the_end_of_a_prompt(line):
    decoded(RemoteDrafter(BOTH), Connection(Address("name"), "0"))
    sent = [event for call in line.handle.calls for event in pickle.loads(call)[1] if isinstance(event, ObservedPrompt)]
    assert {event.key for event in sent} == {1, 2, 3, 4}
    # The last token of a prompt of ten is the root of the first tree.
    assert all((event.start, len(event.top_tokens), event.top_probs) == (5, 4, None) for event in sent)


def test_one_call_a_step_carries_everything_and_no_distribution(line):
    _, results, _ = decoded(RemoteDrafter(BOTH), Connection(Address("name"), "0"), in_flight=4)
    steps = max(result.stats.num_spec_steps for result in results.values())
    # All sequences begin with one call that prefills them; an end is said at once. The last pass has no draft.
    assert len(line.handle.calls) == 1 + steps - 1 + len(REQUESTS)
    assert max(map(len, line.handle.calls[2:])) < 4 * (9 * BOTH.observes * 8 + 1500)


class Sometimes(Fixed):
    """Drafts for every third pass only, and a part of what is proposed."""

    def __init__(self):
        super().__init__(8)
        self.asked = 0

    def budget(self, sequences):
        self.asked += 1
        return 0 if self.asked % 3 else 8

    def select(self, trees, *_):
        return [tree.first(3) for tree in trees]


def test_passes_without_drafts_and_trees_that_were_cut_are_observed_as_they_were(line):
    here, _, memory = decoded(BOTH, policy=Sometimes())
    there, _, _ = decoded(RemoteDrafter(BOTH), Connection(Address("name"), "0"), policy=Sometimes())
    assert there == here
    expected = BOTH.saved(memory)
    learned = line.handle.actor.learned()
    assert all(torch.equal(learned[name], expected[name]) for name in expected)


class LosesTheDrafter(Fixed):
    """Before the sixth pass the drafter is gone or stands still, from the ninth on there is another, or it goes on."""

    def __init__(self, line, fault="dead"):
        super().__init__(8)
        self.line, self.fault, self.asked, self.trees = line, fault, 0, []

    def budget(self, sequences):
        self.asked += 1
        setattr(self.line.handle, self.fault, 6 <= self.asked < 9)
        if self.asked == 9 and self.fault == "dead":
            self.line.handle = Line(BOTH)
        return 8

    def observe(self, outcome):
        self.trees.append((self.asked, len(outcome.tree)))


def test_without_a_drafter_nothing_is_drafted_and_the_next_one_hears_of_every_sequence(line, monkeypatch):
    monkeypatch.setattr("hasten.cluster.actors.remote_drafter._RECONNECT_SECONDS", 0.0)
    plain, _, _ = decoded(None, policy=Fixed(0))
    policy = LosesTheDrafter(line)
    connection = Connection(Address("name"), "0")
    found, _, _ = decoded(RemoteDrafter(BOTH), connection, policy)
    assert found == plain
    assert connection.lost == 3
    assert {nodes for asked, nodes in policy.trees if 6 <= asked < 9} == {0}
    assert any(nodes for asked, nodes in policy.trees if asked >= 9)
    assert not line.handle.actor._sequences


def test_a_drafter_that_stands_still_is_decoded_without_until_it_answers(line, caplog):
    plain, _, _ = decoded(None, policy=Fixed(0))
    policy = LosesTheDrafter(line, "still")
    connection = Connection(Address("name"), "0")
    with caplog.at_level(logging.WARNING):
        found, _, _ = decoded(RemoteDrafter(BOTH), connection, policy)
    assert found == plain
    assert (connection.lost, connection.number) == (0, 1)
    assert caplog.text.count("the drafter has not answered for 10 s") == 1
    assert {nodes for asked, nodes in policy.trees if 6 <= asked < 9} == {0}
    assert any(nodes for asked, nodes in policy.trees if asked >= 9)
    assert not line.handle.actor._sequences


def test_a_lost_verifiers_sequences_are_forgotten(line):
    actor = line.handle.actor
    for client in ("0.0", "1.0"):
        drafter, connection = RemoteDrafter(BOTH), Connection(Address("name"), client)
        context = Context.start([3, 4, 5])
        drafter.begin(context, connection)
        drafter.propose(context, connection, 4)
    actor.forget("0.0")
    assert [client for client, _ in actor._sequences] == ["1.0"]


def test_combinations_learn_if_a_member_does():
    assert TokenRecycling().learns
    assert BOTH.learns
    assert RemoteDrafter(BOTH).learns
    assert Hierarchy(TokenRecycling()).learns
    assert not PromptLookup().learns
    assert not Union((PromptLookup(), PromptLookup(min_ngram=2))).learns
    assert not DraftModel().learns


class Clock:
    """The time module with a time of its own."""

    def __init__(self):
        self.now = self.used = 0.0

    def monotonic(self):
        return self.now

    def thread_time(self):
        return self.used


@pytest.fixture
def snapshots(monkeypatch):
    """An actor that has learned, its clock, and the CPU seconds that a snapshot takes: [seconds]."""
    clock, cost = Clock(), [0.0]
    monkeypatch.setattr("hasten.cluster.actors.drafter.time", clock)
    drafter = TokenRecycling()
    original = TokenRecycling.changes

    def changes(self, memory, whole=False):
        clock.used += cost[0]
        return original(self, memory, whole)

    monkeypatch.setattr(TokenRecycling, "changes", changes)
    actor = DrafterActor(drafter, lambda: drafter.new_memory(Models(tiny.VOCABULARY)))
    actor.serve("0", [Begin(1, [3, 4], 2, Sampling(), 0)], [], 0)
    return actor, clock, cost


def learn(actor, token):
    """Let the actor observe a pass after which `token` was committed."""
    top = np.full((1, 8), token, dtype=np.int32)
    actor.serve("0", [Observed(1, [token], PlainTree([], [], None), [], token, top, None, False)], [], 0)


def test_snapshots_take_a_small_share_of_the_time(snapshots):
    actor, clock, cost = snapshots
    cost[0] = 1.7
    taken = []
    for second in range(0, 2000):
        clock.now = float(second)
        learn(actor, second % 90)
        if actor.snapshot(10.0) is not None:
            taken.append(second)
    assert taken[0] == 10
    assert clock.used <= 0.011 * 2000
    # Where they are cheap, the interval is the one that was asked for.
    cost[0] = 0.0
    clock.now = 2200.0
    for second in range(2200, 2260):
        clock.now = float(second)
        learn(actor, second % 90)
        if actor.snapshot(10.0) is not None:
            taken.append(second)
    assert [second for second in taken if second >= 2200] == [2200, 2210, 2220, 2230, 2240, 2250]


def test_snapshots_of_what_is_new_restore_everything_with_the_last_whole_one(snapshots):
    actor, clock, _ = snapshots
    parts, sizes, wholes = [], [], 0
    for second in range(0, 6000, 10):
        clock.now = float(second)
        learn(actor, second // 10 % 90)
        snapshot = actor.snapshot(10.0)
        if snapshot is None:
            continue
        parts = [snapshot.tensors] if snapshot.whole else [*parts, snapshot.tensors]
        wholes += snapshot.whole
        sizes.append(sum(tensor.nbytes for tensor in snapshot.tensors.values()))
    drafter = TokenRecycling()
    memory = drafter.new_memory(Models(tiny.VOCABULARY))
    drafter.load(memory, parts[0])
    for part in parts[1:]:
        drafter.update(memory, part)
    assert torch.equal(drafter.saved(memory)["successors"], actor.learned()["successors"])
    assert 1 < wholes < 10
    assert sorted(sizes)[len(sizes) // 2] < max(sizes) / 20
    assert actor.snapshot(0.0) is None, "nothing is new"
