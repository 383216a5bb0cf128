"""Dry runs compared with the real runs: memory of every process kind, bytes moved and written, seconds."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start
from hasten.jobs.common.schema import MODEL, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "plan: dry runs against what happened"
SMALL: dict[str, dict[str, object]] = {
    "compress": {"calibration.sequences": 16, "evaluation.sequences": 4},
    "levels": {"calibration.sequences": 16, "bits": "[3,4]"},
    "evaluate": {"evaluation.sequences": 8},
    "decode": {"draft_tokens": 0, "max_new_tokens": 32},
    "search": {"budget": 3.2, "allocator": "exact", "calibration.sequences": 16, "evaluation.sequences": 4},
}
NORMAL: dict[str, dict[str, object]] = {
    "compress": {},
    "levels": {},
    "evaluate": {},
    "decode": {"draft_tokens": 0},
    "search": {"budget": 3.2},
}


@dataclass
class Config(Run):
    """Plan jobs and run them."""

    model: str = option("embedded:target", f"model that the jobs run on: {MODEL}", path="in")
    jobs: list[str] = option(["compress", "levels", "evaluate", "decode", "search"], "jobs to plan and run")
    sizes: list[str] = option(["small", "normal"], "settings of the jobs: small ones, and their defaults")
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Compared:
    """Pairs of the planned and the measured value. peaks: bytes by process kind; moved, written: bytes."""

    job: str
    size: str
    peaks: Mapping[str, tuple[int, int]]
    moved: tuple[int, int] | None
    written: tuple[int, int] | None
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench plan --help` must not wait for it.
    from hasten.jobs.bench.measurements.planned import compare

    for job in config.jobs:
        if job not in NORMAL:
            raise UserError(f"jobs={job} is wrong: expected some of {', '.join(NORMAL)}")
    for size in config.sizes:
        if size not in ("small", "normal"):
            raise UserError(f"sizes={size} is wrong: expected some of small, normal")
    folder = start(config)
    rows = []
    for job in config.jobs:
        for size in config.sizes:
            rows.append(compare(config.model, folder, job, size))
            _LOG.info("%s, %s: %s", job, size, _ratios(rows[-1]))
    publish(config.document, folder, HEADING, _section(config, rows))
    report = {
        "job": "bench plan",
        "config": plain(config),
        "metrics": _worst(rows),
        "runs": [vars(row) | {"peaks": dict(row.peaks)} for row in rows],
        "output": str(folder),
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def _ratios(row: Compared) -> str:
    pairs = {**row.peaks, "moved": row.moved, "written": row.written, "seconds": row.seconds, "CPU": row.cpu_seconds}
    return ", ".join(f"{name} {pair[0] / pair[1]:.3f}" for name, pair in pairs.items() if pair and pair[1])


def _worst(rows: Sequence[Compared]) -> dict[str, float]:
    """Largest relative error of the plans."""
    groups: dict[str, list[tuple[float, float]]] = {"memory": [], "bytes": [], "seconds": [], "cpu_seconds": []}
    for row in rows:
        groups["memory"] += row.peaks.values()
        # The length of completions is not known in advance.
        groups["bytes"] += [pair for pair in (row.moved, row.written) if pair and row.job != "decode"]
        groups["seconds"].append(row.seconds)
        groups["cpu_seconds"].append(row.cpu_seconds)
    return {
        f"largest_error_{name}": max(abs(planned / measured - 1) for planned, measured in pairs)
        for name, pairs in groups.items()
        if pairs
    }


def _section(config: Config, rows: Sequence[Compared]) -> str:
    """The document's section, without its heading."""
    cells = []
    for row in rows:
        name = f"{row.job}, {row.size}"
        for kind, peak in row.peaks.items():
            cells.append([name, f"peak of {kind}, MB", *_cells(peak, 1e6, "{:.0f}")])
        for label, pair in (("sums moved, MB", row.moved), ("written, MB", row.written)):
            if pair is not None:
                cells.append([name, label, *_cells(pair, 1e6, "{:.3f}")])
        cells.append([name, "seconds", *_cells(row.seconds, 1, "{:.1f}")])
        cells.append([name, "CPU seconds of all processes", *_cells(row.cpu_seconds, 1, "{:.1f}")])
    text = [
        f"Plans of jobs on `{config.model}` and the same jobs from the command's start to its end, on rates measured "
        "just before each.\n\nSmall: 16 calibration sequences, 4 or 8 windows, two levels, 32 tokens, the exact "
        "allocator; normal: the defaults, decoding without drafts, 3.2 bits.",
        provenance(),
        table(["job", "of", "planned", "measured", "ratio"], cells),
    ]
    return "\n\n".join(text)


def _cells(pair: tuple[float, float], unit: float, form: str) -> list[str]:
    ratio = f"{pair[0] / pair[1]:.3f}" if pair[1] else "–"
    return [form.format(pair[0] / unit), form.format(pair[1] / unit), ratio]
