"""The cluster of a job: what its workers ask for, by its options, and a Ray session that is checked first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hasten.accel.errors import UserError
from hasten.cluster.runtime.placement import ActorResources, check_workers
from hasten.cluster.runtime.process_group import check_group
from hasten.cluster.runtime.session import session
from hasten.cluster.runtime.visibility import check
from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.common.schema import TargetGroup
from hasten.jobs.common.sizes import parse_bytes


class InWorkers(Protocol):
    """Options of a job that hands its work to actors."""

    device: str
    workers: int
    threads: int
    worker_gpus: float | None
    worker_memory: str | None


class InCluster(InWorkers, Protocol):
    """Options of a job that joins a Ray cluster or starts one."""

    address: str | None


def worker_resources(config: InWorkers) -> ActorResources:
    """CPUs, GPUs and memory of each of the job's workers; UserError where the options contradict each other."""
    usual = gpus_per_worker(config.device)
    gpus = usual if config.worker_gpus is None else config.worker_gpus
    if usual and not gpus:
        # Ray hides all GPUs from an actor that asks for none.
        raise UserError("worker_gpus=0 leaves the workers no GPU: use device=cpu, or more than 0, such as 0.5")
    memory = None if config.worker_memory is None else parse_bytes("worker_memory", config.worker_memory)
    return ActorResources(config.threads, gpus, memory)


@contextmanager
def cluster_session(
    config: InCluster,
    cpus: int,
    reads: Mapping[str, Path],
    writes: Mapping[str, Path],
    in_turn: bool = False,
    group: TargetGroup | None = None,
) -> Iterator[None]:
    """Context with a Ray session at config.address; UserError if CPUs or GPUs are missing or a node lacks the files.

    cpus: sum over the job's actors. reads, writes: paths that actors read or write, by option. in_turn: workers are
    tasks, which run one after the other if the cluster has room for fewer. group: that each worker is; None is one
    process.
    """
    with session(config.address, cpus):
        workers, needs = 1 if in_turn else config.workers, worker_resources(config)
        if group is not None and group.size > 1:
            check_group(group.size, needs, "target_group.size", workers)
        else:
            check_workers(workers, needs)
        check(reads, writes)
        yield
