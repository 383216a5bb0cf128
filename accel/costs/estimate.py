"""Estimate of a job for a dry run: memory of its processes, bytes moved and written, and seconds of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

DRIVER = "driver"
# Memory that all processes of a node share, and that is counted once.
SHARED = "sums in the object store"


@dataclass(frozen=True)
class Rates:
    """Throughput of one process with its threads, and memory of a process after its imports.

    flops: FLOP/s of matrix products in the job's dtype; exact_flops: in float32. elements: float32 numbers a second
    through an elementwise operation. launch: seconds of an operation on a tiny tensor. memory, store, read, disk,
    network: bytes per second copied in the memory of the computing device, copied between processes, read from files,
    written to files, sent between two nodes. start: CPU seconds of a process's imports; finish: of the driver's imports
    for reports and tracking; session: seconds to start Ray. worker_bytes, driver_bytes: memory of a process after its
    imports. device_bytes: GPU memory of a process without tensors. share: share of a processor that a busy process gets
    at present. forked: CPU seconds of a worker that is forked after the imports; None where each worker imports itself.
    """

    flops: float
    exact_flops: float
    elements: float
    launch: float
    memory: float
    store: float
    read: float
    disk: float
    network: float
    start: float
    finish: float
    session: float
    worker_bytes: int
    driver_bytes: int
    device_bytes: int = 0
    share: float = 1.0
    forked: float | None = None

    @property
    def worker_start(self) -> float:
        """CPU seconds of a worker's start."""
        return self.start if self.forked is None else self.forked


@dataclass(frozen=True)
class Work:
    """An amount of work. flops: of matrix products in the job's dtype; exact_flops: in float32.

    elements: float32 numbers through elementwise operations. launches: number of operations. memory_bytes: read from
    the memory of the computing device. file_bytes: read from files.
    """

    flops: float = 0.0
    exact_flops: float = 0.0
    elements: float = 0.0
    launches: float = 0.0
    memory_bytes: float = 0.0
    file_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in self.__dataclass_fields__))

    def seconds(self, rates: Rates) -> float:
        """CPU seconds of one process that does all of the work."""
        return (
            self.flops / rates.flops
            + self.exact_flops / rates.exact_flops
            + self.elements / rates.elements
            + self.launches * rates.launch
            + self.memory_bytes / rates.memory
            + self.file_bytes / rates.read
        )


@dataclass(frozen=True)
class Process:
    """Processes of one kind. cpus, gpus: resources that each process requests.

    host, device: bytes of its main memory and of its GPU's memory, by phase of its work and by purpose. stage: stage of
    the job; processes of different stages do not exist at the same time, except for the driver.
    """

    kind: str
    count: int
    cpus: float
    host: Mapping[str, Mapping[str, int]]
    gpus: float = 0.0
    device: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stage: int = 0

    @property
    def peak_bytes(self) -> int:
        """Peak memory of one process."""
        return sum(self.peak_parts.values())

    @property
    def own_bytes(self) -> int:
        """Peak memory of one process without the memory that it shares with others."""
        return max((sum(parts.values()) - parts.get(SHARED, 0) for parts in self.host.values()), default=0)

    @property
    def device_bytes(self) -> int:
        """Peak GPU memory of one process; 0 without a GPU."""
        return sum(self.device_parts.values())

    @property
    def peak_parts(self) -> Mapping[str, int]:
        """Bytes by purpose, in the phase that takes most memory."""
        return _largest(self.host)

    @property
    def device_parts(self) -> Mapping[str, int]:
        """The same on the GPU."""
        return _largest(self.device)


def _largest(phases: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    return max(phases.values(), key=lambda parts: sum(parts.values()), default={})


@dataclass(frozen=True)
class Step:
    """A part of a job. seconds: wall time where every process has its processors. cpu_seconds: of all processes.

    waits: wall time, in addition, in which nothing is computed: disks, networks, other programs. guess: what is guessed
    in the estimate, such as a method that states no cost; empty where nothing is.
    """

    name: str
    seconds: float
    cpu_seconds: float
    waits: float = 0.0
    guess: str = ""

    @property
    def label(self) -> str:
        """The name, and what is guessed."""
        return f"{self.name} ({self.guess})" if self.guess else self.name

    def wall(self, share: float = 1.0, processors: float = inf) -> float:
        """Wall seconds on `processors` processors, where a busy process gets this share of one."""
        return max(self.seconds, self.cpu_seconds / processors) / share + self.waits


@dataclass(frozen=True)
class Estimate:
    """Resources that a job needs.

    moved: bytes sent between processes, by content. store: peak bytes in the object store. written: bytes of files, by
    content. notes: limits of the estimate.
    """

    processes: tuple[Process, ...]
    steps: tuple[Step, ...]
    moved: Mapping[str, int] = field(default_factory=dict)
    store: int = 0
    written: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Bytes sent between processes."""
        return sum(self.moved.values())

    @property
    def written_bytes(self) -> int:
        """Bytes written."""
        return sum(self.written.values())

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all processes."""
        return sum(step.cpu_seconds for step in self.steps)

    def seconds(self, share: float = 1.0, processors: float = inf) -> float:
        """Wall seconds on `processors` processors, where a busy process gets this share of one."""
        return sum(step.wall(share, processors) for step in self.steps)

    def joined(self, later: "Estimate") -> "Estimate":
        """Estimate of two parts of a job in sequence: steps and bytes are added, and the larger driver counts."""
        stage = max((process.stage for process in self.processes), default=-1) + 1
        drivers = [process for process in (*self.processes, *later.processes) if process.kind == DRIVER]
        others = [process for process in self.processes if process.kind != DRIVER]
        others += [
            replace(process, stage=process.stage + stage) for process in later.processes if process.kind != DRIVER
        ]
        return replace(
            self,
            processes=(*others, *([max(drivers, key=lambda driver: driver.peak_bytes)] if drivers else [])),
            steps=self.steps + later.steps,
            moved=_added(self.moved, later.moved),
            store=max(self.store, later.store),
            written=_added(self.written, later.written),
            notes=tuple(dict.fromkeys(self.notes + later.notes)),
        )


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in dict.fromkeys([*one, *other])}
