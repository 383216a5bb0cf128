"""Plans held against what happened: memory of every kind of process, bytes moved and written, seconds."""

import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.jobs.bench._watch import watched
from hasten.jobs.common.schema import MODEL, Run, option
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.options import PlanConfig

LOG = logging.getLogger(__name__)
HEADING = "plan: dry runs against what happened"
_INTERVAL_SECONDS = 1.0
# What a process is called in a plan and by the system.
_KINDS = {
    "driver": "driver",
    "calibrator": "Calibrator",
    "evaluation": "_evaluate",
    "verifier": "VerifierActor",
    "evaluator": "Evaluator",
}
_SMALL: dict[str, dict[str, Any]] = {
    "compress": {"calibration.sequences": 16, "evaluation.sequences": 4},
    "levels": {"calibration.sequences": 16, "bits": "[3,4]"},
    "evaluate": {"evaluation.sequences": 8},
    "decode": {"draft_tokens": 0, "max_new_tokens": 32},
    "search": {"budget": 3.2, "allocator": "exact", "calibration.sequences": 16, "evaluation.sequences": 4},
}
_NORMAL: dict[str, dict[str, Any]] = {
    "compress": {},
    "levels": {},
    "evaluate": {},
    "decode": {"draft_tokens": 0},
    "search": {"budget": 3.2},
}


@dataclass
class Config(Run):
    """Plan jobs and run them."""

    model: str = option("embedded:target", f"what the jobs run on: {MODEL}", path="in")
    jobs: list[str] = option(["compress", "levels", "evaluate", "decode", "search"], "jobs to plan and run")
    sizes: list[str] = option(["small", "normal"], "settings of the jobs: small ones, and their defaults")
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Compared:
    """A job's plan and its run. peaks: bytes by kind of process, planned and happened; the rest likewise."""

    job: str
    size: str
    peaks: Mapping[str, tuple[int, int]]
    moved: tuple[int, int] | None
    written: tuple[int, int] | None
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]


def run(config: Config) -> Path:
    """Path of the report; the table is printed and put into the document."""
    from hasten.accel.errors import UserError
    from hasten.jobs.bench._markdown import default_document, replace_section
    from hasten.jobs.cli.compose import plain
    from hasten.jobs.common.run import start

    for job in config.jobs:
        if job not in _NORMAL:
            raise UserError(f"jobs={job} is wrong: expected some of {', '.join(_NORMAL)}")
    for size in config.sizes:
        if size not in ("small", "normal"):
            raise UserError(f"sizes={size} is wrong: expected some of small, normal")
    folder = start(config)
    found = []
    for job in config.jobs:
        for size in config.sizes:
            found.append(_compared(config, folder, job, size))
            LOG.info("%s, %s: %s", job, size, _figures(found[-1]))
    text = _section(config, found)
    replace_section(Path(config.document) if config.document else default_document(folder), HEADING, text)
    print(text, flush=True)
    report = {
        "job": "bench plan",
        "config": plain(config),
        "metrics": _worst(found),
        "runs": [vars(each) | {"peaks": dict(each.peaks)} for each in found],
        "output": str(folder),
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def _compared(config: Config, folder: Path, job: str, size: str) -> Compared:
    from hasten.cluster.runtime.rates import measure
    from hasten.jobs.cli.compose import compose
    from hasten.jobs.dry_run.run import make_plan

    place = (folder / f"{job}-{size}").resolve()
    place.mkdir()
    chosen = (_SMALL if size == "small" else _NORMAL)[job]
    # The job runs in a folder of its own, where no earlier level database is.
    model = Path(config.model).resolve() if Path(config.model).exists() else config.model
    options: dict[str, Any] = {"target" if job == "decode" else "model": model, **chosen}
    output = {"evaluate": None, "decode": place / "completions.jsonl"}.get(job, place / "model")
    options |= {"run_dir": place / "run", "tracking.uri": f"sqlite:///{place / 'mlflow.db'}"}
    if output is not None:
        options["output"] = output
    words = [f"{key}={value}" for key, value in options.items()]
    measure.cache_clear()
    composed = compose(job, jobs()[job].options, words)
    plan = make_plan(job, composed, PlanConfig())
    command = [sys.executable, "-m", "hasten", job, *words]
    environment = {"RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    usage = watched(command, place / "hasten.out", environment, _INTERVAL_SECONDS, place)
    if usage.status:
        raise RuntimeError(f"hasten {job} ended with status {usage.status}: see {place / 'hasten.out'}")
    estimate = plan.estimate
    compared = Compared(
        job,
        size,
        {
            each.kind: (each.peak_bytes, usage.peaks[_KINDS[each.kind]].rss_bytes)
            for each in estimate.processes
            if _KINDS[each.kind] in usage.peaks
        },
        _moved(composed, estimate) if job in ("compress", "levels") else None,
        None if output is None else (estimate.written_bytes, _bytes(output) + _bytes(place / "runs")),
        (plan.seconds, usage.seconds),
        (estimate.cpu_seconds, usage.cpu_seconds),
    )
    if output is not None and output.is_dir():
        shutil.rmtree(output)
    return compared


def moved_bytes(config: Any) -> int:
    """Bytes that a job's calibrators send of all blocks: those of the first one are made here, and counted."""
    import dataclasses

    import torch

    from hasten.accel.compression.calibration.settings import Task
    from hasten.accel.compression.calibration.statistics import split
    from hasten.accel.compression.outputs.resumable import PROGRESS
    from hasten.cluster.actors.calibrator import Calibrator
    from hasten.jobs.common.calibration import original
    from hasten.jobs.compress.run import make_settings

    settings = make_settings(config, original(config.model))
    settings = dataclasses.replace(settings, output=Path(f"{settings.output}{PROGRESS}-counted"))
    length = config.calibration.sequence_length
    tokens = torch.zeros(config.calibration.sequences, length, dtype=torch.long)
    chunks = dict(enumerate(tokens.tensor_split(min(settings.shards, len(tokens)))))
    task = Task(settings)
    total, keys = 0, [group.key for group in task.plan[0]]
    for part in split(len(chunks), config.workers):
        calibrator = Calibrator(settings, {number: chunks[number] for number in part})
        total += sum(sums.nbytes for nodes in calibrator.collect(0, keys).values() for *_, sums in nodes)
    return total * task.architecture.num_blocks


def _moved(config: Any, estimate: Any) -> tuple[int, int] | None:
    """Sums that calibrators send, planned and counted; of a checkpoint alone, whose settings are at hand."""
    if not hasattr(config, "evaluation"):
        return None
    return estimate.moved["sums of second moments"], moved_bytes(config)


def _bytes(output: Path) -> int:
    if output.is_file():
        return output.stat().st_size
    return sum(file.stat().st_size for file in output.rglob("*") if file.is_file())


def _figures(one: Compared) -> str:
    pairs = {**one.peaks, "moved": one.moved, "written": one.written, "seconds": one.seconds, "CPU": one.cpu_seconds}
    return ", ".join(f"{name} {pair[0] / pair[1]:.3f}" for name, pair in pairs.items() if pair and pair[1])


def _worst(found: list[Compared]) -> dict[str, float]:
    """Largest distance of a ratio of plan and run from 1."""
    groups: dict[str, list[tuple[float, float]]] = {"memory": [], "bytes": [], "seconds": [], "cpu_seconds": []}
    for one in found:
        groups["memory"] += one.peaks.values()
        # Completions are texts, whose length nobody knows before.
        groups["bytes"] += [pair for pair in (one.moved, one.written) if pair and one.job != "decode"]
        groups["seconds"].append(one.seconds)
        groups["cpu_seconds"].append(one.cpu_seconds)
    return {
        f"largest_error_{name}": max(abs(planned / happened - 1) for planned, happened in pairs)
        for name, pairs in groups.items()
        if pairs
    }


def _section(config: Config, found: list[Compared]) -> str:
    """The document's section, without its heading."""
    from hasten.jobs.bench._markdown import provenance, table

    rows = []
    for one in found:
        name = f"{one.job}, {one.size}"
        for kind, pair in one.peaks.items():
            rows.append([name, f"peak of {kind}, MB", *_row(pair, 1e6, "{:.0f}")])
        for what, pair_ in (("sums moved, MB", one.moved), ("written, MB", one.written)):
            if pair_ is not None:
                rows.append([name, what, *_row(pair_, 1e6, "{:.3f}")])
        rows.append([name, "seconds", *_row(one.seconds, 1, "{:.1f}")])
        rows.append([name, "CPU seconds of all processes", *_row(one.cpu_seconds, 1, "{:.1f}")])
    text = [
        f"Plans of jobs on `{config.model}` and the same jobs from the command's start to its end, on rates measured "
        "just before each.\n\nSmall: 16 calibration sequences, 4 or 8 windows, two levels, 32 tokens, the exact "
        "allocator; normal: the defaults, decoding without drafts, 3.2 bits.",
        provenance(),
        table(["job", "of", "planned", "happened", "ratio"], rows),
    ]
    return "\n\n".join(text)


def _row(pair: tuple[float, float], unit: float, form: str) -> list[str]:
    ratio = f"{pair[0] / pair[1]:.3f}" if pair[1] else "–"
    return [form.format(pair[0] / unit), form.format(pair[1] / unit), ratio]
