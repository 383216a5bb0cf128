"""What waits for room is known to Ray, and so to an autoscaler."""

import time
from functools import partial

import pytest

from hasten.cluster.programs import sweep_points as points
from hasten.cluster.programs.sweep_points import Ending, Pool, Work
from hasten.cluster.runtime.demand import Demand
from hasten.cluster.tracking.tracker import write_report

pytestmark = pytest.mark.ray


def pending():
    """Bundles of every group that Ray could not place yet."""
    import ray

    found = ray.util.placement_group_table().values()
    return [list(group["bundles"].values()) for group in found if group["state"] == "PENDING"]


@pytest.fixture
def demand(ray_session):
    """Ends whatever becomes of the test: what it holds would be missing in others."""
    made = Demand()
    yield made
    made.end()


def test_what_does_not_fit_is_asked_for_as_often_as_it_is_to_run(demand):
    big = [{"CPU": 3}, {"CPU": 3}]
    demand.ask(big, 3)
    assert pending() == [[{"CPU": 3.0}, {"CPU": 3.0}]] * 3
    demand.ask(big, 1)
    assert len(pending()) == 1
    demand.ask([{"CPU": 9}], 1)
    assert pending() == [[{"CPU": 9.0}]], "in place of what was asked before"
    demand.end()
    assert pending() == []


def test_what_has_found_room_is_given_back(demand):
    import ray

    demand.ask([{"CPU": 4}], 1)
    (group,) = demand._groups
    assert group.wait(60)
    demand.ask([{"CPU": 4}], 1)
    assert demand._groups == []
    assert ray.get(ray.remote(lambda: 1).options(num_cpus=4).remote(), timeout=60) == 1


def _point(folder):
    time.sleep(1)
    write_report(folder, {"metrics": {}})


class _Three:
    def __init__(self, folder):
        self._folder, self._given, self.seen, self.endings = folder, 0, [], []

    def left(self):
        return 3 - self._given

    def next(self):
        if not self.left():
            return None
        self._given += 1
        folder = self._folder / str(self._given)
        return Work(str(self._given), folder, partial(_point, folder), cpus=4)

    def started(self, work):
        pass

    def ended(self, work: Work, ending: Ending):
        self.endings.append(ending.status)

    def waiting(self):
        self.seen.append(len(pending()))


@pytest.mark.parametrize("grows", [True, False])
def test_points_that_wait_are_asked_for_where_a_cluster_grows(tmp_path, ray_session, monkeypatch, grows):
    monkeypatch.setattr(points, "grows", lambda: grows)
    source = _Three(tmp_path)
    Pool().run(source)
    assert source.endings == ["finished"] * 3
    assert max(source.seen) == (2 if grows else 0)
    assert pending() == []
