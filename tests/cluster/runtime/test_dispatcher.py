"""The dispatcher on workers that are made up here: no Ray, and a clock that moves only when the dispatcher waits."""

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from hasten.accel.errors import UserError
from hasten.cluster.runtime.dispatcher import Dispatcher, SharedQueue, Workload
from hasten.cluster.runtime.recovery import ATTEMPTS, Batches, is_actors_own, is_loss, is_out_of_memory


class FakeWorkload(Workload):
    """Workers that compute `key -> 10 * key` in a second of the clock each, one key after another.

    events: what happens instead at the Nth submission of all (from 0): an error, or the seconds that it takes.
    streams: results come one by one, else with the last one. can_cancel: as tasks can be.
    """

    name = "a worker"

    def __init__(self, count, events=(), streams=False, can_cancel=False, batch=4):
        self.events, self.streams, self.can_cancel = dict(events), streams, can_cancel
        self.owners = [object() for _ in range(count)]
        self.vacant = {}
        self.now = 0.0
        self.submissions, self.replaced, self.cancelled = [], [], []
        self.batches = Batches("batch", batch, "use fewer workers")

    def clock(self):
        return self.now

    def workers(self):
        return [worker for worker, owner in enumerate(self.owners) if owner is not None]

    def owner(self, worker):
        return self.owners[worker]

    def submit(self, worker, keys):
        event = self.events.get(len(self.submissions), 1.0)
        self.submissions.append((worker, list(keys)))
        seconds = 1.0 if isinstance(event, Exception) else event
        begins = max([self.now, *(call["ready"] for call in self.running if call["worker"] == worker)])
        call = {"worker": worker, "keys": list(keys), "ready": begins + seconds, "seconds": seconds, "event": event}
        self.running.append(call)
        return call

    @property
    def running(self):
        return self.__dict__.setdefault("_running", [])

    def wait(self, handles, seconds):
        until = min([self.now + seconds, *(call["ready"] for call in handles)])
        self.now = max(self.now, until)
        for worker, at in list(self.vacant.items()):
            if self.now >= at:
                del self.vacant[worker]
                self.owners[worker] = object()
        return [call for call in handles if call["ready"] <= self.now]

    def receive(self, assignment):
        call = assignment.handle
        if isinstance(call["event"], Exception):
            self.running.remove(call)
            raise call["event"]
        if self.streams and call["keys"]:
            key = call["keys"].pop(0)
            call["ready"] = self.now + call["seconds"] if call["keys"] else self.now
            return [(key, 10 * key)], False
        self.running.remove(call)
        return [(key, 10 * key) for key in call["keys"]], True

    def recover(self, worker, keys, error):
        if is_out_of_memory(error):
            self.batches.halve(worker, self.name)
        elif not is_loss(error):
            raise error
        elif not is_actors_own(error):
            return
        self.replaced.append((worker, keys))
        self.owners[worker] = None
        self.vacant[worker] = self.now + 3.0

    def batch(self, worker):
        return self.batches.of(worker)

    def cancel(self, assignment):
        if self.can_cancel:
            self.cancelled.append(assignment.worker)
            self.running.remove(assignment.handle)
        return self.can_cancel


def run(work, count, size=None, dispatcher=None):
    dispatcher = dispatcher or Dispatcher(work, work.clock)
    results = list(dispatcher.run(range(count), SharedQueue(range(count), size)))
    assert sorted(results) == [(key, 10 * key) for key in range(count)], "each key once, with its own result"
    return results


def out_of_memory():
    return RayTaskError("compute", "Traceback", MemoryError()).as_instanceof_cause()


def test_every_free_worker_gets_the_next_key():
    work = FakeWorkload(2)
    run(work, 5)
    assert work.submissions == [(0, [0]), (1, [1]), (0, [2]), (1, [3]), (0, [4])]
    assert work.now == 3.0


def test_a_lost_workers_key_comes_next_and_its_replacement_goes_on():
    work = FakeWorkload(2, {1: ActorDiedError()})
    run(work, 8)
    assert work.replaced == [(1, [1])]
    assert work.submissions[2] == (0, [1])
    # A replacement is there three seconds after the loss.
    assert [worker for worker, _ in work.submissions].count(1) == 3


def test_all_that_a_lost_worker_had_ahead_is_put_back_in_its_order():
    work = FakeWorkload(1, {1: ActorDiedError()})
    work.depth = 3
    run(work, 6)
    assert work.replaced == [(0, [1])]
    assert [keys for _, keys in work.submissions] == [[0], [1], [2], [3], [1], [2], [3], [4], [5]]


def test_a_lost_argument_costs_its_own_call_and_no_worker():
    work = FakeWorkload(2, {0: ObjectLostError("00", None, "")})
    run(work, 3)
    assert work.replaced == []
    assert work.submissions == [(0, [0]), (1, [1]), (0, [0]), (1, [2])]


def test_losses_without_a_result_are_counted_to_the_limit():
    error = ActorDiedError()
    work = FakeWorkload(1, dict.fromkeys(range(ATTEMPTS), error))
    with pytest.raises(ActorDiedError) as raised:
        run(work, 1)
    assert raised.value is error
    assert len(work.submissions) == ATTEMPTS
    # One result begins the count anew.
    losses = [number for number in range(2 * ATTEMPTS - 1) if number != ATTEMPTS - 1]
    work = FakeWorkload(1, dict.fromkeys(losses, error))
    run(work, 2)
    assert len(work.submissions) == 2 * ATTEMPTS


def test_out_of_memory_halves_the_batch_of_its_worker_once():
    work = FakeWorkload(2, {0: out_of_memory()})
    run(work, 4)
    assert [work.batches.of(worker) for worker in range(2)] == [2, 4]
    work = FakeWorkload(1, {0: out_of_memory(), 1: out_of_memory()})
    with pytest.raises(UserError, match=r"a worker ran out of memory with batch=2 \(half of 4\): set batch=1, or use"):
        run(work, 1)


def test_an_error_that_is_not_recoverable_is_raised_as_it_is():
    error = RayTaskError("compute", "Traceback", ValueError("wrong")).as_instanceof_cause()
    with pytest.raises(ValueError, match="Traceback"):
        run(FakeWorkload(2, {1: error}), 4)


def test_a_stragglers_key_is_computed_by_an_idle_worker_as_well():
    work = FakeWorkload(2, {1: 100.0})
    run(work, 3)
    # Late after half as much again as the longest call.
    assert work.submissions == [(0, [0]), (1, [1]), (0, [2]), (0, [1])]
    assert work.now < 5.0


def test_nothing_is_late_before_a_call_has_ended():
    work = FakeWorkload(2, {0: 50.0, 1: 60.0})
    run(work, 2)
    assert work.submissions == [(0, [0]), (1, [1])]
    assert work.now == 60.0


def test_a_superseded_actor_stays_busy_and_is_used_again_once_its_call_ends():
    work = FakeWorkload(2, {1: 100.0})
    dispatcher = Dispatcher(work, work.clock)
    run(work, 3, dispatcher=dispatcher)
    run(work, 3, dispatcher=dispatcher)
    assert work.submissions[4:] == [(0, [0]), (0, [1]), (0, [2])]
    work.now = 100.0
    before = len(work.submissions)
    run(work, 4, dispatcher=dispatcher)
    assert {worker for worker, _ in work.submissions[before:]} == {0, 1}


def test_a_superseded_task_is_cancelled_and_its_place_is_free():
    work = FakeWorkload(2, {1: 100.0}, can_cancel=True)
    dispatcher = Dispatcher(work, work.clock)
    run(work, 3, dispatcher=dispatcher)
    assert work.cancelled == [1]
    before = len(work.submissions)
    run(work, 2, dispatcher=dispatcher)
    assert work.submissions[before:] == [(0, [0]), (1, [1])]


def test_a_copy_that_is_lost_leaves_the_key_to_the_other_worker():
    work = FakeWorkload(3, {1: 6.0, 3: ActorDiedError()})
    run(work, 3)
    copies = [worker for worker, keys in work.submissions if keys == [1]]
    assert copies[:2] == [1, 0]
    assert work.replaced == [(0, [])]


def test_what_is_not_repeatable_is_waited_for():
    work = FakeWorkload(2, {1: 20.0})
    work.is_repeatable = lambda key: False
    run(work, 3)
    assert work.submissions == [(0, [0]), (1, [1]), (0, [2])]
    assert work.now == 20.0


def test_first_calls_of_workers_are_compared_with_each_other_alone():
    work = FakeWorkload(2, {0: 30.0, 1: 40.0})
    called = set()
    work.kind = lambda worker: worker in called or called.add(worker)
    run(work, 4)
    assert [keys for _, keys in work.submissions[:2]] == [[0], [1]]
    assert [worker for worker, keys in work.submissions if keys == [1]] == [1]


def test_streams_give_results_one_by_one_and_large_assignments_come_first():
    work = FakeWorkload(2, streams=True)
    results = run(work, 12, lambda waiting: max(2, waiting // 4))
    assert [len(keys) for _, keys in work.submissions] == [3, 2, 2, 2, 2, 1]
    assert [key for key, _ in results[:2]] == [0, 3]


def test_of_a_straggling_stream_the_last_keys_are_computed_first_and_at_most_a_batch():
    work = FakeWorkload(2, {0: 1.0, 1: 100.0}, streams=True, batch=2)
    results = run(work, 8, lambda waiting: 4)
    assert work.submissions[2:4] == [(0, [7, 6]), (0, [5, 4])]
    assert len(results) == 8


def test_a_broken_stream_gives_back_only_what_is_missing():
    class Breaking(FakeWorkload):
        def receive(self, assignment):
            if assignment.worker == 0 and self.now == 3.0 and not self.replaced:
                raise ActorDiedError
            return super().receive(assignment)

    work = Breaking(1, streams=True)
    run(work, 4, lambda waiting: 4)
    assert work.replaced == [(0, [2, 3])]
    assert [keys for _, keys in work.submissions] == [[0, 1, 2, 3], [2, 3]]


def test_settling_ends_what_is_about_to_and_leaves_the_rest():
    work = FakeWorkload(2, {1: 3.25})
    dispatcher = Dispatcher(work, work.clock)
    run(work, 3, dispatcher=dispatcher)
    assert dispatcher.is_busy(1) or dispatcher.is_busy(0)
    dispatcher.settle(0.5)
    assert not dispatcher.is_busy(1)
    dispatcher.reset()
    assert not dispatcher.is_busy(0)
