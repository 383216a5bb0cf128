"""Resources of a job's workers on the cluster, from the job's options."""

from typing import Protocol

from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.common.sizes import parse_bytes


class InWorkers(Protocol):
    """Options of a job that hands its work to actors."""

    device: str
    workers: int
    threads: int
    worker_gpus: float | None
    worker_memory: str | None


def worker_resources(config: InWorkers) -> ActorResources:
    """CPUs, GPUs and memory of each of the job's workers; UserError if worker_memory is not a size."""
    gpus = gpus_per_worker(config.device) if config.worker_gpus is None else config.worker_gpus
    memory = None if config.worker_memory is None else parse_bytes("worker_memory", config.worker_memory)
    return ActorResources(config.threads, gpus, memory)
