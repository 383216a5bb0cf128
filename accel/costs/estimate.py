"""Estimate of a job for a dry run: memory of its processes, bytes moved and written, and seconds of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

DRIVER = "driver"
# Memory that all processes of a node map and that is counted once.
SHARED = "sums in the object store"


@dataclass(frozen=True)
class Rates:
    """Throughput of one process with its threads, and memory of a process that has only imported what it needs.

    flops: FLOP/s of matrix products in the job's dtype; exact_flops: in float32. elements: float32 numbers a second
    through a small operation. launch: seconds of an operation on next to nothing. memory, store, read, disk, network:
    bytes a second copied where the arithmetic is, copied between processes, read from files, written to files, sent
    between two nodes. start: CPU seconds until a process has imported what it needs; finish: until the driver has what
    reports and tracking need; session: until Ray is there. worker_bytes, driver_bytes: of a process with its imports.
    device_bytes: of the GPU before anything is put there. share: of a processor that a busy process gets at present.
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


@dataclass(frozen=True)
class Work:
    """Arithmetic to be done. flops: in the job's dtype; exact_flops: in float32.

    elements: float32 numbers that go through small operations, launches: how many operations there are. memory_bytes:
    read where the arithmetic is; file_bytes: read from files.
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
        """CPU seconds of one process that does it alone."""
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
    """Processes of one kind. cpus, gpus: that each asks the cluster for.

    host, device: bytes of its own memory and of its GPU's, by phase of its work and by what takes them. stage: of the
    job; but for the driver, processes of different stages are not there at once.
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
        """Most memory that one of them holds."""
        return sum(self.peak_parts.values())

    @property
    def own_bytes(self) -> int:
        """Most memory that one of them holds without what it shares with others."""
        return max((sum(parts.values()) - parts.get(SHARED, 0) for parts in self.host.values()), default=0)

    @property
    def device_bytes(self) -> int:
        """Most memory that one of them holds on its GPU; 0 without one."""
        return sum(self.device_parts.values())

    @property
    def peak_parts(self) -> Mapping[str, int]:
        """Bytes by what takes them, in the phase that takes most."""
        return _largest(self.host)

    @property
    def device_parts(self) -> Mapping[str, int]:
        """The same on the GPU."""
        return _largest(self.device)


def _largest(phases: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    return max(phases.values(), key=lambda parts: sum(parts.values()), default={})


@dataclass(frozen=True)
class Step:
    """A part of a job: wall seconds with whole processors, CPU seconds of all processes, seconds that are only waited.

    waits: seconds of wall time in which nothing is computed: disks, networks, other programs. guess: what of it is
    guessed, as for a method that states no cost; empty where nothing is.
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
        """Seconds on so many processors, of which a busy process gets this share."""
        return max(self.seconds, self.cpu_seconds / processors) / share + self.waits


@dataclass(frozen=True)
class Estimate:
    """Resources that a job needs.

    moved: bytes that travel between processes, by what they are. store: bytes that lie in the object store at most.
    written: bytes of files, by what they are. notes: what the estimate does not know.
    """

    processes: tuple[Process, ...]
    steps: tuple[Step, ...]
    moved: Mapping[str, int] = field(default_factory=dict)
    store: int = 0
    written: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Bytes that travel."""
        return sum(self.moved.values())

    @property
    def written_bytes(self) -> int:
        """Bytes written."""
        return sum(self.written.values())

    @property
    def cpu_seconds(self) -> float:
        """Of all processes together."""
        return sum(step.cpu_seconds for step in self.steps)

    def seconds(self, share: float = 1.0, processors: float = inf) -> float:
        """Wall seconds on so many processors, of which a busy process gets this share."""
        return sum(step.wall(share, processors) for step in self.steps)

    def joined(self, later: "Estimate") -> "Estimate":
        """One part of a job after the other: steps and bytes add up, and of two drivers the larger one counts."""
        stage = max((process.stage for process in self.processes), default=-1) + 1
        drivers = [process for process in (*self.processes, *later.processes) if process.kind == DRIVER]
        others = [process for process in self.processes if process.kind != DRIVER]
        others += [
            replace(process, stage=process.stage + stage) for process in later.processes if process.kind != DRIVER
        ]
        return replace(
            self,
            processes=(*others, *([max(drivers, key=lambda each: each.peak_bytes)] if drivers else [])),
            steps=self.steps + later.steps,
            moved=_added(self.moved, later.moved),
            store=max(self.store, later.store),
            written=_added(self.written, later.written),
            notes=tuple(dict.fromkeys(self.notes + later.notes)),
        )


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in dict.fromkeys([*one, *other])}
