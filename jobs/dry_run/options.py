"""Options of `hasten plan JOB` and `plan=true`."""

from dataclasses import dataclass

from hasten.jobs.cli.options import split_off
from hasten.jobs.common.schema import option
from hasten.jobs.common.sizes import BYTES, parse_bytes

PREFIX = "plan."


@dataclass
class PlanConfig:
    """The cluster that `hasten plan JOB` and `plan=true` plan for; on the command line each has `plan.` before it.

    What is null is this machine's, measured; of GPUs that are not here, and of networks, something usual is assumed.
    """

    nodes: int = option(1, "nodes, all alike", at_least=1)
    cpus: int | None = option(None, "processors of a node", at_least=1)
    memory: str | None = option(None, f"of a node: {BYTES}; null is what is free here")
    gpus: int | None = option(None, "GPUs of a node; null is those here", at_least=0)
    gpu_memory: str | None = option(None, f"of a GPU: {BYTES}; null is 80GB where there is none here")
    disk: str | None = option(None, f"free where outputs go: {BYTES}; null is what is free here")
    network: str | None = option(None, f"between two nodes, a second: {BYTES}; null is 1.25GB, 10 Gbit/s")
    disk_speed: str | None = option(None, f"written and read in a second: {BYTES}")
    memory_speed: str | None = option(None, f"copied by a process, or in a GPU's memory, in a second: {BYTES}")
    flops: float | None = option(None, "FLOP/s of a process in the job's dtype, such as 4e14", at_least=1)
    exact_flops: float | None = option(None, "FLOP/s of a process in float32", at_least=1)
    launch: float | None = option(None, "seconds of the smallest operation, such as 5e-6", at_least=1e-9)
    tokens_per_pass: float = option(
        1.0, "tokens that a pass of decoding gives, which no plan knows before; 1 is without drafts", at_least=1
    )


def parse_words(words: list[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's own options out of `key=value` words, and the words that are left; UserError names a wrong one."""
    found, rest = split_off(PlanConfig, PREFIX, words)
    for name in ("memory", "gpu_memory", "disk", "network", "disk_speed", "memory_speed"):
        size_of(found, name)
    return found, rest


def size_of(plan_config: PlanConfig, name: str) -> int | None:
    """Bytes of one of the plan's sizes, None where it is not given; UserError where it is no size."""
    text = getattr(plan_config, name)
    return None if text is None else parse_bytes(PREFIX + name, text)
