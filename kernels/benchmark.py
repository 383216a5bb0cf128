"""Benchmark of every kernel against its torch reference: `python -m hasten.kernels.benchmark [--device cuda|cpu]`.

Each op's `benchmark.py` lists its cases. For each case the kernel's output is compared with the reference's; then both
are timed, and so are the case's peers, which are other libraries' implementations. Inputs are random, and rotated
through more memory than the cache holds. A sample is one rotation, after warm-up, timed with CUDA events on a GPU; the
table gives the median and the 10th and 90th percentile per call. Bytes per second are also given as a share of the
device's copy rate, measured in the same run. If the environment variable OUT is set, kernels.json and kernels.md are
written to that folder. Only torch, triton and kernels are imported.
"""

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from math import inf
from pathlib import Path
from time import perf_counter

import torch

import hasten.kernels
from hasten.kernels.timing import (
    DRY,
    SAMPLES,
    SEED,
    WARMUP,
    Case,
    Skipped,
    Timing,
    check,
    copy_rate,
    rotation,
    time_calls,
)

_MAX_MESSAGE = 200


@dataclass(frozen=True)
class Row:
    """Measurements of one implementation in one case.

    copy_share: bytes per second divided by the device's copy rate. speedup: over the reference.
    """

    op: str
    implementation: str
    shape: str
    dtype: str
    device: str
    seconds: Timing
    bytes_per_second: float
    flops_per_second: float
    copy_share: float
    speedup: float


@dataclass
class Results:
    """What a run measured. copy_rates: bytes per second of a copy, by device type. wrong: failed comparisons."""

    environment: dict[str, str | int]
    dry: bool
    copy_rates: dict[str, float] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def op_names() -> list[str]:
    """Names of the ops, which are the folders of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(hasten.kernels.__path__) if module.ispkg)


def all_cases(device: torch.device, dry: bool, ops: Sequence[str] = ()) -> Iterator[Case | Skipped]:
    """Cases of these ops, or of all; dry: sizes small enough for Triton's interpreter.

    The first case of every op comes before the second of any, so that a run that is out of time has measured each op.
    """
    modules = [importlib.import_module(f"hasten.kernels.{name}.benchmark") for name in ops or op_names()]
    for cases in zip_longest(*(module.cases(device, dry) for module in modules)):
        yield from (case for case in cases if case is not None)


def run(device: torch.device, dry: bool = False, ops: Sequence[str] = (), seconds: float = inf) -> Results:
    """Check and time the cases of these ops, or of all.

    device: where Triton kernels run; on `cpu`, where they do not, only C kernels are timed, except in a dry run.
    seconds: after this time no further case is begun.
    """
    results = Results(environment(device), dry)
    started = perf_counter()
    # Operands are made later, so that the cases of a GPU can be listed without one.
    for case in all_cases(device if dry else torch.device("cuda"), dry, ops):
        if isinstance(case, Skipped):
            results.skipped.append(case)
            continue
        where, name = torch.device(case.device_type), f"{case.op} {case.shape} {case.dtype}"
        if where.type == "cuda" and device.type == "cpu":
            missing = Skipped(case.op, "its Triton kernels need a GPU")
            results.skipped += [missing] if missing not in results.skipped else []
        elif perf_counter() - started > seconds:
            results.skipped.append(Skipped(name, f"the run's {seconds:.0f} seconds were over"))
        else:
            _run_case(case, name, where, results)
    return results


def _run_case(case: Case, name: str, device: torch.device, results: Results) -> None:
    if device.type not in results.copy_rates:
        results.copy_rates[device.type] = copy_rate(device, results.dry)
    print(f"{name} on {device.type}", file=sys.stderr, flush=True)
    try:
        check(case, device)
    except Exception as error:  # a kernel that does not compile or run must not lose the rows of others
        results.wrong.append(f"{name}: {type(error).__name__}: {error}")
        return
    rows, missing = measure(case, device, results.copy_rates[device.type], results.dry)
    results.rows += rows
    results.skipped += missing


def measure(case: Case, device: torch.device, rate: float, dry: bool) -> tuple[list[Row], list[Skipped]]:
    """Rows of the kernel, its reference and its peers, and the peers that do not run here.

    rate: copy rate of the device, in bytes per second.
    """
    buffers = rotation(case, device, dry)
    # Compilation happens in the warm-up calls. The times of a dry run mean nothing.
    rotations = DRY if dry else (SAMPLES, WARMUP)
    timings = {
        "kernel": time_calls(case.kernel, buffers, *rotations),
        "reference": time_calls(case.reference, buffers, *rotations),
    }
    skipped: list[Skipped] = []
    for name, peer in case.peers.items():
        try:
            timings[name] = time_calls(peer, buffers, *rotations)
        except Exception as error:  # an operator that this torch or this GPU lacks must not lose the other rows
            message = str(error).partition("\n")[0][:_MAX_MESSAGE]  # torch lists all backends of an operator
            reason = f"{name} at {case.shape} {case.dtype}: {type(error).__name__}: {message}"
            skipped.append(Skipped(case.op, reason))
    rows = [
        Row(
            case.op,
            name,
            case.shape,
            case.dtype,
            device.type,
            timing,
            case.nbytes / timing.median,
            case.flops / timing.median,
            case.nbytes / timing.median / rate,
            timings["reference"].median / timing.median,
        )
        for name, timing in timings.items()
    ]
    return rows, skipped


def environment(device: torch.device) -> dict[str, str | int]:
    """Device, versions, commit and seed, on which the measurements depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "missing"
    return {
        "device": name,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "seed": SEED,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def text(results: Results) -> str:
    """Markdown: the environment, what is missing or wrong, then a row for each implementation of each case."""
    lines = [", ".join(f"{name} {value}" for name, value in results.environment.items()), ""]
    for name, rate in results.copy_rates.items():
        lines.append(f"copy rate of {name}: {rate / 1e9:.1f} GB/s (bytes read and written)")
    lines += [f"not measured: {case.op}, {case.reason}" for case in results.skipped]
    lines += [f"WRONG OUTPUT, not timed: {failure}" for failure in results.wrong]
    if results.dry:
        lines.append("dry run on a CPU with interpreted Triton kernels: the times mean nothing")
    lines += [
        "",
        "| op | implementation | shape | dtype | device | µs, median (10–90 %) | GB/s | of copy | GFLOP/s | speedup |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(results.rows, key=lambda row: row.op):
        low, middle, high = (1e6 * value for value in (row.seconds.low, row.seconds.median, row.seconds.high))
        time = f"{middle:.1f} ({low:.1f}–{high:.1f})" + (" launch-bound" if row.seconds.launch_bound else "")
        lines.append(
            f"| {row.op} | {row.implementation} | {row.shape} | {row.dtype} | {row.device} | {time} "
            f"| {row.bytes_per_second / 1e9:.1f} | {row.copy_share:.0%} | {row.flops_per_second / 1e9:.1f} "
            f"| {row.speedup:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if an output was wrong, 2 if the device does not exist."""
    parser = argparse.ArgumentParser(prog="python -m hasten.kernels.benchmark", description="Benchmark all kernels.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on tiny sizes")
    parser.add_argument("--seconds", type=float, default=inf, help="after this time no further case is begun")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dry = device.type == "cpu"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, with the first op's cases
    elif not torch.cuda.is_available():
        print(
            "kernel benchmarks need a GPU, and torch finds no CUDA device: use --device cpu for a dry run without one"
        )
        return 2
    results = run(device, dry, seconds=given.seconds)
    report = f"## Kernels\n\n{text(results)}"
    out = os.environ.get("OUT")
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
        (folder / "kernels.md").write_text(report + "\n")
    print(report)
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
