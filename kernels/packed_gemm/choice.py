"""Launch configurations of the Triton kernels: measured ones from the cache folder, else defaults by GPU and shape.

Nothing is measured unless `measure` is called, which the kernel benchmark does on a GPU.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from hasten.kernels.cache import default_cache

# Up to this many rows of activations are multiplied without tensor cores: each costs as much as the dequantization.
MAX_GEMV_ROWS = 4
# Warps of 32 threads that a multiprocessor should hold, so that enough loads are in flight, and columns and stages of a
# tile on tensor cores, by what a GPU's name contains. The shared memory of the last row suits consumer GPUs, too.
_TABLE = {
    "H100": (16, 128, 3),
    "H200": (20, 128, 3),
    "B200": (24, 128, 3),
    "A100": (12, 64, 4),
    "": (12, 64, 2),
}


@dataclass(frozen=True)
class Gemv:
    """Launch without tensor cores: rows of the weight of a thread, warps along the columns, splits of the columns."""

    rows_of_thread: int
    warps: int
    splits: int = 1


@dataclass(frozen=True)
class Matmul:
    """Launch on tensor cores: rows of the weight, rows of x and columns of a tile; stages: depth of the pipeline."""

    block_r: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


Configuration = Gemv | Matmul


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    n: rows of x, rounded up to a power of two. itemsize: bytes of an element of x. kind: how codes become numbers,
    because weights of one size differ in instructions.
    """

    n: int
    rows: int
    columns: int
    bits: int
    itemsize: int
    kind: str = "integer"

    @property
    def key(self) -> str:
        """Name in the file of measurements."""
        sizes = "x".join(str(value) for value in (self.n, self.rows, self.columns, self.bits, self.itemsize))
        return f"{self.kind} {sizes}"


def problem(n: int, rows: int, columns: int, bits: int, itemsize: int, kind: str = "integer") -> Problem:
    """The problem that n rows of x belong to."""
    return Problem(1 << max(n - 1, 0).bit_length(), rows, columns, bits, itemsize, kind)


@dataclass(frozen=True)
class Gpu:
    """What defaults depend on: a GPU's name and its number of multiprocessors."""

    name: str
    processors: int


def default(problem: Problem, gpu: Gpu) -> Configuration:
    """Configuration derived from instruction counts and bytes in flight; it was not measured."""
    warps, block_k, stages = next(row for name, row in _TABLE.items() if name in gpu.name)
    processors = gpu.processors
    if problem.n <= MAX_GEMV_ROWS:
        return _default_gemv(problem, processors, warps)
    block_n = min(max(problem.n, 16), 128)
    # Each program reads all of x: tall tiles read it less often. Splits fill the processors that row tiles leave idle.
    block_r = 128 if problem.itemsize == 2 else 32
    programs = -(-problem.rows // block_r) * -(-problem.n // block_n)
    splits = max(1, min(processors // programs, problem.columns // 512, 8))
    if problem.itemsize == 4:
        return Matmul(block_r, min(block_n, 32), 64, 4, 2, splits)
    # Longer tiles of 8 bits would spill registers.
    block_k = 64 if block_n == 128 or problem.bits >= 8 else block_k
    return Matmul(block_r, block_n, block_k, 8 if block_n >= 64 else 4, stages, splits)


def _default_gemv(problem: Problem, processors: int, warps_of_processor: int) -> Gemv:
    # Registers of a thread hold rows_of_thread words for each unit and as many sums for each row of x.
    for rows_of_thread in (4, 2, 1) if problem.n == 1 else (2, 1):
        programs = -(-problem.rows // (8 * rows_of_thread))
        if programs >= processors * 7 // 8:
            break
    # A warp covers 64 bytes of a row at a time.
    steps = max(1, problem.columns * problem.bits // 8 // 64)
    warps = 16
    while warps > 2 and (programs * warps > 2 * processors * warps_of_processor or warps > steps):
        warps //= 2
    splits = max(1, min(processors // programs, steps // (2 * warps), 8))
    return Gemv(rows_of_thread, warps, splits)


def candidates(problem: Problem, gpu: Gpu) -> list[Configuration]:
    """The default and its neighbours, which are measured; few, because each is compiled, which takes a second."""
    chosen = [default(problem, gpu)]
    if problem.n <= MAX_GEMV_ROWS:
        chosen += [Gemv(1, 8), Gemv(2, 8), Gemv(2, 16), Gemv(4, 16) if problem.n == 1 else Gemv(1, 16)]
    if problem.n > 1 and problem.itemsize == 2:
        block_n = min(max(problem.n, 16), 128)
        chosen += [Matmul(64, block_n, 128, 4, 3, splits) for splits in (1, 2, 4)]
        chosen += [Matmul(128, block_n, 64, 8, 4, splits) for splits in (1, 2)]
    return list(dict.fromkeys(chosen))


def configuration(problem: Problem, device: torch.device) -> Configuration:
    """The measured configuration of this GPU, else the default."""
    gpu = _gpu(device)
    return _measured(_path(gpu)).get(problem.key) or default(problem, gpu)


def measure(problem: Problem, device: torch.device, seconds: Callable[[Configuration], float]) -> Configuration:
    """The fastest candidate; it is written to the cache folder, and later calls use it.

    seconds: time of one call with a configuration; infinite for one that this GPU cannot run.
    """
    gpu = _gpu(device)
    timed = {candidate: seconds(candidate) for candidate in candidates(problem, gpu)}
    best = min(timed, key=lambda candidate: timed[candidate])
    path = _path(gpu)
    _write(path, {**_read(path), problem.key: best})
    _measured.cache_clear()
    return best


@cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.multi_processor_count)


@cache
def _path(gpu: Gpu) -> Path:
    # Compilers differ in what is fastest.
    import triton

    key = hashlib.sha256(f"{gpu.name} {triton.__version__}".encode()).hexdigest()[:12]
    return default_cache().expanduser() / "kernels" / f"packed_gemm-{key}.json"


@cache
def _measured(path: Path) -> dict[str, Configuration]:
    return _read(path)


def _read(path: Path) -> dict[str, Configuration]:
    with suppress(OSError, ValueError, TypeError):
        kinds: dict[str, type[Gemv] | type[Matmul]] = {"gemv": Gemv, "matmul": Matmul}
        return {key: kinds[kind](**fields) for key, (kind, fields) in json.loads(path.read_text()).items()}
    return {}


def _write(path: Path, measured: dict[str, Configuration]) -> None:
    content = {key: (type(value).__name__.lower(), asdict(value)) for key, value in measured.items()}
    # Without a writable cache folder, nothing is kept.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
