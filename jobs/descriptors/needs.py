"""The resources that a run takes of a cluster.

A job that hands its work to actors waits meanwhile and takes no processor itself; one that computes in its own process
takes its threads.
"""

from typing import Protocol

from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.common.workers import InWorkers, worker_resources
from hasten.jobs.descriptors.descriptor import Needs


class InProcess(Protocol):
    """Options of a job that computes in its own process."""

    device: str
    threads: int


def of_workers(config: InWorkers) -> Needs:
    """Resources of a job that hands its work to `workers` actors."""
    return Needs(0.0, 0.0, config.threads, (worker_resources(config).bundle,) * config.workers)


def of_process(config: InProcess) -> Needs:
    """Resources of a job that computes in its own process."""
    return Needs(float(config.threads), float(gpus_per_worker(config.device)), config.threads)
