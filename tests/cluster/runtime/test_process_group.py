import os
import signal
import time

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup, Rank, check_group
from tests.cluster.processes import wait_for

pytestmark = pytest.mark.ray


class Summing(Rank):
    """Ranks that add their numbers up."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def total(self) -> float:
        """Sum over the ranks of factor * (rank + 1)."""
        import torch

        number = torch.tensor(float(self.factor * (self.rank + 1)))
        torch.distributed.all_reduce(number)
        return float(number)

    def refuse(self) -> None:
        """A mistake of the user, on the last rank; the other one waits for it for ever."""
        if self.rank == self.size - 1:
            raise UserError("factor=3 is odd")
        self.total()

    def process_id(self) -> int:
        return os.getpid()

    def wait_for_the_last(self) -> None:
        if self.rank == self.size - 1:
            time.sleep(1000)
        self.total()


@pytest.fixture
def group(ray_session):
    pytest.importorskip("deepspeed", reason="needs the extra `distributed`")
    group = ProcessGroup(Summing, 2, ActorResources(0.5), [3])
    yield group
    group.close()


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_rank_ends_its_group_with_the_error_of_its_loss(group):
    assert group.call("total") == [9.0, 9.0]
    first, second = group.call("process_id")
    calls = [rank.wait_for_the_last.remote() for rank in group.ranks]
    os.kill(second, signal.SIGKILL)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        group.results(calls)
    assert recovery.is_loss(raised.value)
    wait_for(lambda: not is_running(first))  # it would wait for its peer for ever


def test_a_rank_that_refuses_ends_its_group_with_its_own_error(group):
    with pytest.raises(UserError, match="factor=3 is odd"):
        group.call("refuse")


def test_a_group_larger_than_the_cluster_is_refused_at_once(ray_session):
    with pytest.raises(UserError, match=r"no more than .* on one; target_group.size=1000 with threads=2, on one node"):
        check_group(1000, ActorResources(2), "target_group.size")
