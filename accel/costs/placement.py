"""Placement of a job's processes on the nodes of a cluster, and processes that fit on no node."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hasten.accel.costs.estimate import DRIVER, Process


@dataclass(frozen=True)
class Node:
    """What a node of a cluster has: processors, GPUs and bytes of each one's memory, bytes of its own memory.

    grows: whether Ray will say that it has as many processors as are asked for, as it does where a job starts it.
    """

    cpus: float
    memory: int
    gpus: int = 0
    gpu_memory: int = 0
    grows: bool = False


@dataclass
class Placed:
    """Load of a node: processes by kind, bytes of its memory, and peak bytes of one of its GPUs."""

    node: Node
    processes: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    cpus: float = 0.0
    gpus: float = 0.0
    gpu_memory: int = 0


@dataclass(frozen=True)
class Refusal:
    """Processes that fit nowhere. resource: cpus, gpus, gpu_memory or memory, of which each needs so much.

    there: what the node has left of it that has most.
    """

    kind: str
    count: int
    resource: str
    needed: float
    there: float


@dataclass(frozen=True)
class Placement:
    """Processes on nodes, and those that were refused."""

    nodes: Sequence[Placed]
    refused: tuple[Refusal, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether everything has a place."""
        return not self.refused


def place(processes: Iterable[Process], nodes: Sequence[Node], store: int = 0) -> Placement:
    """Each process on the node that has most room for it; store: bytes of the object store, spread over used nodes.

    The driver is on the first node all the time. Stages follow each other: of a node's memory the most that a stage
    takes is told, and all its processes.
    """
    everyone = list(processes)
    drivers = [process for process in everyone if process.kind == DRIVER]
    stages = sorted({process.stage for process in everyone if process.kind != DRIVER}) or [0]
    whole = [Placed(node) for node in nodes]
    refused: list[Refusal] = []
    for stage in stages:
        own = [process for process in everyone if process.kind != DRIVER and process.stage == stage]
        placed = [Placed(node) for node in nodes]
        for process in [*drivers, *own]:
            refusal = _put(process, placed[:1] if process.kind == DRIVER else placed)
            refused += [refusal] if refusal is not None and refusal not in refused else []
        used = [each for each in placed if each.processes]
        for each in used:
            each.memory += store // len(used)
        for total, each in zip(whole, placed, strict=True):
            total.processes |= each.processes
            total.memory, total.cpus = max(total.memory, each.memory), max(total.cpus, each.cpus)
            total.gpus, total.gpu_memory = max(total.gpus, each.gpus), max(total.gpu_memory, each.gpu_memory)
    return Placement(whole, tuple(refused))


def _put(process: Process, placed: Sequence[Placed]) -> Refusal | None:
    """Place all processes of a kind; a refusal for those that fit on no node."""
    missing, lack = 0, ("", 0.0, 0.0)
    for _ in range(process.count):
        found, lacking = _room(process, placed)
        if found is None:
            missing, lack = missing + 1, lacking or lack
            continue
        found.processes[process.kind] = found.processes.get(process.kind, 0) + 1
        found.memory += process.own_bytes
        found.gpu_memory = max(found.gpu_memory, process.device_bytes)
        found.cpus += process.cpus
        found.gpus += process.gpus
    return Refusal(process.kind, missing, *lack) if missing else None


def _room(process: Process, placed: Sequence[Placed]) -> tuple[Placed | None, tuple[str, float, float] | None]:
    """The node with most room for one more, or else what is lacking on the node that lacks least."""
    fitting: list[Placed] = []
    lack: tuple[str, float, float] | None = None
    for each in placed:
        node = each.node
        left = {
            "gpu_memory": (float(process.device_bytes), float(node.gpu_memory) if process.gpus else float("inf")),
            "gpus": (process.gpus, node.gpus - each.gpus),
            "cpus": (process.cpus, float("inf") if node.grows else node.cpus - each.cpus),
            "memory": (float(process.own_bytes), float(node.memory - each.memory)),
        }
        short = next(((name, need, there) for name, (need, there) in left.items() if need > there), None)
        if short is None:
            fitting.append(each)
        elif lack is None or short[2] > lack[2]:
            lack = short
    if not fitting:
        return None, lack
    return min(fitting, key=lambda each: (each.gpus, each.memory / max(1, each.node.memory), each.cpus)), None
