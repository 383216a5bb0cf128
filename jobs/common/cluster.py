"""The Ray session of a job, which first checks the cluster's resources and that its nodes see the job's files."""

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
def cluster_session(
    config: InCluster, cpus: int, reads: Mapping[str, Path], writes: Mapping[str, Path], in_turn: bool = False
) -> Iterator[None]:
    """Context with a Ray session at config.address; UserError if CPUs or GPUs are missing or a node lacks the files.

    cpus: sum over the job's actors. reads, writes: paths that actors read or write, by option. in_turn: workers are
    tasks, which run one after the other if the cluster has room for fewer.
    """
    with session(config.address, cpus):
        check_workers(1 if in_turn else config.workers, worker_resources(config))
        check(reads, writes)
        yield
