"""Options of `hasten plan JOB` and `plan=true`."""

from dataclasses import dataclass

from hasten.jobs.cli.options import split_off
from hasten.jobs.common.schema import option
from hasten.jobs.common.sizes import BYTES, parse_bytes

PREFIX = "plan."


@dataclass
class PlanConfig:
    """The cluster that `hasten plan JOB` and `plan=true` plan for; on the command line each option begins with `plan.`.

    Options that are null are measured on this machine. For GPUs that it does not have, and for networks, usual values
    are assumed.
    """

    nodes: int = option(1, "nodes, all alike", at_least=1)
    cpus: int | None = option(None, "processors of a node", at_least=1)
    memory: str | None = option(None, f"memory of a node, {BYTES}; null is the free memory here")
    gpus: int | None = option(None, "GPUs of a node; null is the number here", at_least=0)
    gpu_memory: str | None = option(None, f"memory of a GPU, {BYTES}; null is that of the GPU here, else 80GB")
    disk: str | None = option(None, f"free space for outputs, {BYTES}; null is the free space here")
    network: str | None = option(None, f"bandwidth between two nodes per second, {BYTES}; null is 1.25GB (10 Gbit/s)")
    disk_speed: str | None = option(None, f"disk bandwidth per second, {BYTES}")
    memory_speed: str | None = option(None, f"memory bandwidth of a process or a GPU per second, {BYTES}")
    flops: float | None = option(None, "FLOP/s of a process in the job's dtype, such as 4e14", at_least=1)
    exact_flops: float | None = option(None, "FLOP/s of a process in float32", at_least=1)
    launch: float | None = option(None, "seconds to launch the smallest operation, such as 5e-6", at_least=1e-9)
    tokens_per_pass: float = option(
        1.0, "tokens per target pass in decoding, which a plan cannot predict; 1 is without drafts", at_least=1
    )


def parse_words(words: list[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's own options from `key=value` words, and the remaining words; UserError names a wrong one."""
    plan_config, remaining = split_off(PlanConfig, PREFIX, words)
    for name in ("memory", "gpu_memory", "disk", "network", "disk_speed", "memory_speed"):
        size_of(plan_config, name)
    return plan_config, remaining


def size_of(plan_config: PlanConfig, name: str) -> int | None:
    """Bytes of one of the plan's sizes, None if it is not given; UserError if it is not a size."""
    text = getattr(plan_config, name)
    return None if text is None else parse_bytes(PREFIX + name, text)
