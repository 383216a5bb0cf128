"""The Ray session of a job, begun with a look at whether the cluster can do what the job asks of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hasten.cluster.runtime.placement import check_workers
from hasten.cluster.runtime.session import session
from hasten.cluster.runtime.visibility import check
from hasten.jobs.common.workers import InWorkers, worker_resources


class InCluster(InWorkers, Protocol):
    """Options of a job that joins a Ray cluster or starts one."""

    address: str | None


@contextmanager
def joined(
    config: InCluster, cpus: int, reads: Mapping[str, Path], writes: Mapping[str, Path], in_turn: bool = False
) -> Iterator[None]:
    """A Ray session at config.address, once it is seen to have the processors, and every node the files.

    cpus: what the job's actors need together. reads, writes: paths that actors, not this process, read or write, by the
    options that they come from. in_turn: workers are tasks, which wait for each other where there is room for fewer.
    """
    with session(config.address, cpus):
        check_workers(1 if in_turn else config.workers, worker_resources(config))
        check(reads, writes)
        yield
