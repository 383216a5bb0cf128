"""Checks and times one implementation of an op: CUDA events, rotated inputs, median and spread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

Operands = tuple[Tensor, ...]

SEED = 0
SAMPLES, WARMUP = 20, 3
# Of a dry run, in which each call of an interpreted kernel takes long: as few as have deciles.
DRY = (2, 0)
# Rotated inputs fill the cache this many times, so that no input is still cached when it is used again.
_CACHES = 4
_CPU_CACHE_BYTES = 2**26
_MAX_BUFFERS = 160
# The device sleeps for this many clock cycles, about 20 ms, while the host queues a rotation. Otherwise Python's launch
# time would be measured for small kernels.
_QUEUE_CYCLES = 40_000_000


@dataclass(frozen=True)
class Case:
    """One op with inputs of one size.

    device_type: `cuda` or `cpu`, where the kernel runs. operands(generator, device): new random inputs. kernel,
    reference: the two implementations, which take the same operands. nbytes: bytes that the kernel reads and writes in
    a call, also used for the other implementations' bytes per second. flops: operations of a call. rtol, atol:
    tolerances of the comparison. peers: further implementations by name, such as a library's, which take the same
    operands. They are timed and not compared, because they may round differently or compute on other formats. prepare:
    called with operands on a GPU before the kernel's first call, to measure its launch configurations.
    """

    op: str
    shape: str
    dtype: str
    device_type: str
    operands: Callable[[torch.Generator, torch.device], Operands]
    kernel: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    nbytes: int
    flops: int
    rtol: float = 0.0
    atol: float = 0.0
    peers: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    prepare: Callable[..., object] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 10th and 90th percentile. launch_bound: whether the host was slower than the device."""

    median: float
    low: float
    high: float
    launch_bound: bool


@dataclass(frozen=True)
class Skipped:
    """An op that cannot be measured on this machine, and why."""

    op: str
    reason: str


def check(case: Case, device: torch.device) -> None:
    """AssertionError if the kernel's output differs from the reference's. The kernel is prepared first."""
    operands = case.operands(torch.Generator(device).manual_seed(SEED), device)
    if case.prepare is not None and device.type == "cuda":
        case.prepare(*operands)
    torch.testing.assert_close(case.kernel(*operands), case.reference(*operands), rtol=case.rtol, atol=case.atol)


def time_calls(
    function: Callable[..., object], buffers: Sequence[Operands], samples: int, warmup: int = WARMUP
) -> Timing:
    """Time per call, from `samples` rotations over all buffers, after `warmup` others."""
    on_gpu = buffers[0][0].is_cuda
    rotate = _rotate_on_gpu if on_gpu else _rotate_on_cpu
    results = [rotate(function, buffers) for _ in range(warmup + samples)][warmup:]
    seconds = [result[0] / len(buffers) for result in results]
    deciles = quantiles(seconds, n=10, method="inclusive")
    return Timing(median(seconds), deciles[0], deciles[-1], any(result[1] for result in results))


def _rotate_on_gpu(function: Callable[..., object], buffers: Sequence[Operands]) -> tuple[float, bool]:
    """Seconds of one call on every buffer on the device, and whether the device ran out of queued calls."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    # All outputs are kept: otherwise they would be written to the same memory, which is cached.
    outputs = [function(*operands) for operands in buffers]
    stop.record()
    # If the start event has passed already, the device began before the whole rotation was queued.
    launch_bound = start.query()
    torch.cuda.synchronize()
    del outputs
    return start.elapsed_time(stop) / 1000, launch_bound


def _rotate_on_cpu(function: Callable[..., object], buffers: Sequence[Operands]) -> tuple[float, bool]:
    start = perf_counter()
    outputs = [function(*operands) for operands in buffers]
    seconds = perf_counter() - start
    del outputs
    return seconds, False


def rotation(case: Case, device: torch.device, dry: bool) -> list[Operands]:
    """Operands of several calls, all different, which together exceed the device's cache; of one call in a dry run."""
    on_gpu = device.type == "cuda"
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size) if on_gpu else _CPU_CACHE_BYTES
    count = 1 if dry else min(_MAX_BUFFERS, max(2, -(-_CACHES * cache // case.nbytes)))
    generator = torch.Generator(device).manual_seed(SEED)
    return [case.operands(generator, device) for _ in range(count)]


def copy_rate(device: torch.device, dry: bool) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    size = 2**24 if dry else 2**28
    generator = torch.Generator(device).manual_seed(SEED)
    source, target = (torch.randn(size, generator=generator, device=device) for _ in range(2))
    rotations = DRY if dry else (SAMPLES, WARMUP)
    timing = time_calls(lambda a, b: a.copy_(b), [(target, source), (source, target)], *rotations)
    return 2 * source.nbytes / timing.median
