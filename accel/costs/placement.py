"""Placement of a job's processes on the nodes of a cluster, and the processes that fit on no node."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hasten.accel.costs.estimate import DRIVER, Process


@dataclass(frozen=True)
class Node:
    """Resources of a node. memory: bytes of main memory. gpu_memory: bytes of each GPU.

    grows: whether Ray registers as many processors as are requested, as it does where the job itself starts Ray.
    """

    cpus: float
    memory: int
    gpus: int = 0
    gpu_memory: int = 0
    grows: bool = False


@dataclass
class Placed:
    """Load of a node: number of processes by kind, bytes of main memory, processors, GPUs, peak bytes of a GPU."""

    node: Node
    processes: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    cpus: float = 0.0
    gpus: float = 0.0
    gpu_memory: int = 0


@dataclass(frozen=True)
class Refusal:
    """Processes of a kind that fit on no node. resource: what is lacking: cpus, gpus, gpu_memory or memory.

    needed: amount that a process needs. available: amount that is free on the node with most of it.
    """

    kind: str
    count: int
    resource: str
    needed: float
    available: float


@dataclass(frozen=True)
class Placement:
    """Load of every node, and the processes that fit on no node."""

    nodes: Sequence[Placed]
    refused: tuple[Refusal, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all processes are placed."""
        return not self.refused


def place(processes: Iterable[Process], nodes: Sequence[Node], store: int = 0) -> Placement:
    """Place each process on the node with most room. store: bytes of the object store, spread over the used nodes.

    The driver is on the first node in all stages. Stages run one after the other: a node's load is its peak over the
    stages, with the processes of all stages.
    """
    all_processes = list(processes)
    drivers = [process for process in all_processes if process.kind == DRIVER]
    stages = sorted({process.stage for process in all_processes if process.kind != DRIVER}) or [0]
    peaks = [Placed(node) for node in nodes]
    refused: list[Refusal] = []
    for stage in stages:
        own = [process for process in all_processes if process.kind != DRIVER and process.stage == stage]
        placed = [Placed(node) for node in nodes]
        for process in [*drivers, *own]:
            refusal = _put(process, placed[:1] if process.kind == DRIVER else placed)
            refused += [refusal] if refusal is not None and refusal not in refused else []
        used = [load for load in placed if load.processes]
        for load in used:
            load.memory += store // len(used)
        for peak, load in zip(peaks, placed, strict=True):
            peak.processes |= load.processes
            peak.memory, peak.cpus = max(peak.memory, load.memory), max(peak.cpus, load.cpus)
            peak.gpus, peak.gpu_memory = max(peak.gpus, load.gpus), max(peak.gpu_memory, load.gpu_memory)
    return Placement(peaks, tuple(refused))


def _put(process: Process, placed: Sequence[Placed]) -> Refusal | None:
    """Place all processes of a kind; returns a Refusal of those that fit on no node."""
    missing, lack = 0, ("", 0.0, 0.0)
    for _ in range(process.count):
        node, lacking = _room(process, placed)
        if node is None:
            missing, lack = missing + 1, lacking or lack
            continue
        node.processes[process.kind] = node.processes.get(process.kind, 0) + 1
        node.memory += process.own_bytes
        node.gpu_memory = max(node.gpu_memory, process.device_bytes)
        node.cpus += process.cpus
        node.gpus += process.gpus
    return Refusal(process.kind, missing, *lack) if missing else None


def _room(process: Process, placed: Sequence[Placed]) -> tuple[Placed | None, tuple[str, float, float] | None]:
    """The node with most room for one more process, or else (resource, needed, available) where least is lacking."""
    fitting: list[Placed] = []
    lack: tuple[str, float, float] | None = None
    for load in placed:
        node = load.node
        # (needed, available) of each resource.
        resources = {
            "gpu_memory": (float(process.device_bytes), float(node.gpu_memory) if process.gpus else float("inf")),
            "gpus": (process.gpus, node.gpus - load.gpus),
            "cpus": (process.cpus, float("inf") if node.grows else node.cpus - load.cpus),
            "memory": (float(process.own_bytes), float(node.memory - load.memory)),
        }
        short = next(((name, needed, free) for name, (needed, free) in resources.items() if needed > free), None)
        if short is None:
            fitting.append(load)
        elif lack is None or short[2] > lack[2]:
            lack = short
    if not fitting:
        return None, lack
    return min(fitting, key=lambda load: (load.gpus, load.memory / max(1, load.node.memory), load.cpus)), None
