"""Sweeps of `bench wait`: time against the ideal, cost of logging, and SIGKILLs, after which no point is lost."""

import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import Report
from hasten.jobs.cli.quotes import if_needed, word
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "sweep: time, kills, logging"


@dataclass
class Config(Run):
    """Measure sweeps on a Ray cluster of two nodes."""

    points: int = option(24, "points of a sweep", at_least=2)
    point_seconds: float = option(1.0, "seconds that a point takes", at_least=0)
    kills: int = option(10, "SIGKILLs to deliver, of which one ends a node", at_least=0)
    loggers: int = option(8, "points that log at the same time", at_least=1)
    steps: int = option(200, "metric steps that each of them logs", at_least=1)
    logging_seconds: float = option(30.0, "seconds that each of them takes", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # Ray: `hasten bench sweep --help` must not wait for it.
    from hasten.jobs.bench.measurements.sweep_kills import kill_sweep

    folder = start(config).absolute()
    with tracked(config, "bench sweep", folder) as tracker:
        tracker.params(plain(config))
        metrics = {**_time(config, folder), **_logging(config, folder)}
        if config.kills:
            metrics |= kill_sweep(config, folder)
        publish(config.document, folder, HEADING, _section(config, metrics))
        return tracker.report(
            {"job": "bench", "config": plain(config), "metrics": metrics, "layers": [], "output": None}
        )


def _time(config: Config, folder: Path) -> dict[str, float]:
    """Seconds of a sweep on two CPUs from the start of its first point, with points that sleep and that compute."""
    seconds = {}
    for busy in (False, True):
        kind = "computing" if busy else "sleeping"
        sweep = sweep_command(
            folder / kind, config.points, config.point_seconds, [f"busy={str(busy).lower()}", "sweep.at_once=2"]
        )
        _LOG.info("%d points of %g s, %s", config.points, config.point_seconds, kind)
        subprocess.run(sweep, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        seconds[f"{kind}_seconds"] = _report(folder / kind)["metrics"]["seconds"]
    ideal = -(-config.points // 2) * config.point_seconds
    return {"ideal_seconds": ideal, **seconds, **{f"{name}_ratio": value / ideal for name, value in seconds.items()}}


def _logging(config: Config, folder: Path) -> dict[str, float]:
    """Metric entries in MLflow, and the time of a sweep with logging relative to one without, all points at once."""
    seconds = {}
    for steps in (0, config.steps):
        place = folder / f"logging_{steps}"
        _LOG.info("%d points at once, %d steps each", config.loggers, steps)
        words = [f"steps={steps}", f"sweep.at_once={config.loggers}"]
        # Points sleep, so that more of them than CPUs can run at once.
        command = sweep_command(place, config.loggers, config.logging_seconds, words, cpus=config.loggers)
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        seconds[steps] = _report(place)["metrics"]["seconds"]
    entries = _entries(folder / f"logging_{config.steps}.db")
    return {
        "logged_entries": entries,
        "expected_entries": 2 * config.steps * config.loggers,
        "logging_ratio": seconds[config.steps] / seconds[0],
    }


def sweep_command(place: Path, points: int, seconds: float, words: Sequence[str], cpus: int | None = None) -> list[str]:
    """Command of a sweep in a folder, with an MLflow store beside it; cpus: of a local Ray, None is all."""
    store = if_needed(f"sqlite:///{place}.db")
    job_words = [word("run_dir", place), word("tracking.uri", store), f"wait_seconds={seconds}"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "hasten",
        "bench",
        "wait",
        "--multirun",
        f"point=range(0,{points})",
        *job_words,
        *words,
    ]
    return command if cpus is None else [*command, f"sweep.cpus={cpus}"]


def _report(place: Path) -> Report:
    report: Report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    return report


def _entries(file: Path) -> int:
    with sqlite3.connect(file) as database:
        query = "select count(*) from metrics where key in ('step', 'square')"
        return int(database.execute(query).fetchone()[0])


def _section(config: Config, metrics: Mapping[str, float]) -> str:
    """The document's section, without its heading."""
    rows = []
    for kind in ("sleeping", "computing"):
        ratio = f"{metrics[f'{kind}_seconds_ratio']:.3f} of the ideal"
        name = f"{config.points} points of {config.point_seconds:g} s, two at once, {kind}"
        rows.append([name, f"{metrics[f'{kind}_seconds']:.2f} s", ratio])
    rows.append(
        [
            f"{config.loggers} points that log {config.steps} steps of 2 metrics at once",
            f"{metrics['logged_entries']:.0f} of {metrics['expected_entries']:.0f} entries",
            f"{100 * (metrics['logging_ratio'] - 1):+.2f} % of the time",
        ]
    )
    if config.kills:
        kinds = ", ".join(f"{metrics[name]:.0f} {name[7:]}" for name in sorted(metrics) if name.startswith("killed_"))
        rows.append(
            [
                f"{metrics['kills']:.0f} SIGKILLs ({kinds}), {metrics['sweep_starts']:.0f} starts",
                f"{metrics['points_ended']:.0f} points ended, {metrics['points_ended_twice']:.0f} of them twice",
                f"{metrics['points_in_mlflow']:.0f} runs in MLflow, {metrics['different_points_in_mlflow']:.0f} points",
            ]
        )
    return f"{provenance()}\n\n" + table(["sweep of `bench wait`", "measured", ""], rows)
