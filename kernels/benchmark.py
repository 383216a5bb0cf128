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
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hasten.kernels
from hasten.kernels.timing import SAMPLES, SEED, Case, Skipped, Timing, check, copy_rate, rotation, time_calls

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


def all_cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """Cases of every op; dry: sizes small enough for Triton's interpreter."""
    for module in sorted(pkgutil.iter_modules(hasten.kernels.__path__), key=lambda module: module.name):
        if module.ispkg:
            yield from importlib.import_module(f"hasten.kernels.{module.name}.benchmark").cases(device, dry)


def measure(case: Case, device: torch.device, rate: float, dry: bool) -> tuple[list[Row], list[Skipped]]:
    """Rows of the kernel, its reference and its peers, and the peers that do not run here.

    rate: copy rate of the device, in bytes per second.
    """
    buffers = rotation(case, device, dry)
    samples = 3 if dry else SAMPLES
    # Compilation happens in the warm-up calls.
    timings = {
        "kernel": time_calls(case.kernel, buffers, samples),
        "reference": time_calls(case.reference, buffers, samples),
    }
    skipped: list[Skipped] = []
    for name, peer in case.peers.items():
        try:
            timings[name] = time_calls(peer, buffers, samples)
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


def table(facts: dict[str, str | int], rates: dict[str, float], rows: Sequence[Row], skipped: Sequence[Skipped]) -> str:
    """Markdown: the environment, then a row for each implementation of each case."""
    lines = ["## Kernels", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [f"copy rate of {name}: {rate / 1e9:.1f} GB/s (bytes read and written)" for name, rate in rates.items()]
    lines += [f"not measured: {case.op}, {case.reason}" for case in skipped]
    lines += [
        "",
        "| op | implementation | shape | dtype | device | µs, median (10–90 %) | GB/s | of copy | GFLOP/s | speedup |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
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
    chosen = torch.device(parser.parse_args(arguments).device)
    dry = chosen.type == "cpu"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, with the first op's cases
    elif not torch.cuda.is_available():
        print(
            "kernel benchmarks need a GPU, and torch finds no CUDA device: use --device cpu for a dry run without one"
        )
        return 2
    rates: dict[str, float] = {}
    rows: list[Row] = []
    skipped: list[Skipped] = []
    wrong: list[str] = []
    for case in all_cases(chosen, dry):
        if isinstance(case, Skipped):
            skipped.append(case)
            continue
        device = torch.device(case.device_type)
        name = f"{case.op} {case.shape} {case.dtype}"
        if device.type not in rates:
            rates[device.type] = copy_rate(device, dry)
        print(f"{name} on {device.type}", file=sys.stderr, flush=True)
        try:
            check(case, device)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
            continue
        measured, missing = measure(case, device, rates[device.type], dry)
        rows += measured
        skipped += missing
    facts = environment(chosen)
    report = table(facts, rates, rows, skipped)
    if dry:
        report += "\n\ndry run on a CPU with interpreted Triton kernels: the times mean nothing"
    for failure in wrong:
        report += f"\n\nWRONG OUTPUT, not timed: {failure}"
    out = os.environ.get("OUT")
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": facts,
            "dry": dry,
            "copy_bytes_per_second": rates,
            "skipped": [asdict(case) for case in skipped],
            "rows": [asdict(row) for row in rows],
            "wrong": wrong,
        }
        (folder / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "kernels.md").write_text(report + "\n")
    print(report)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
