"""What runs take of a cluster: a job that hands its work to actors sleeps meanwhile, one that works itself does not."""

from typing import Protocol

from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.descriptors.descriptor import Needs


class InProcess(Protocol):
    """Options of a job that computes in its own process."""

    device: str
    threads: int


class InWorkers(InProcess, Protocol):
    """Options of a job that hands its work to actors."""

    workers: int


def of_workers(config: InWorkers) -> Needs:
    """Of a job that hands its work to `workers` actors."""
    actor = {"CPU": float(config.threads), "GPU": float(gpus_per_worker(config.device))}
    return Needs(0.0, 0.0, config.threads, (actor,) * config.workers)


def of_process(config: InProcess) -> Needs:
    """Of a job that computes in its own process."""
    return Needs(float(config.threads), float(gpus_per_worker(config.device)), config.threads)
