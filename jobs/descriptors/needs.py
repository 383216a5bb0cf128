"""The resources of a run on a cluster.

A job that hands its work to actors only waits, so its own process needs no CPU; a job that computes in its own process
needs a CPU for each of its threads.
"""

from typing import Protocol

from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.common.cluster import InWorkers, worker_resources
from hasten.jobs.common.target_group import with_ranks
from hasten.jobs.descriptors.descriptor import Needs


class InProcess(Protocol):
    """Options of a job that computes in its own process."""

    device: str
    threads: int


def of_workers(config: InWorkers) -> Needs:
    """Resources of a job that hands its work to `workers` actors, or groups of actors."""
    needs, group = worker_resources(config), getattr(config, "target_group", None)
    if group is not None:
        needs = with_ranks(group, needs)
    return Needs(0.0, 0.0, config.threads, (needs.bundle,) * config.workers)


def of_process(config: InProcess) -> Needs:
    """Resources of a job that computes in its own process."""
    return Needs(float(config.threads), float(gpus_per_worker(config.device)), config.threads)
