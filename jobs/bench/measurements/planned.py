"""Plans a job, runs it and compares; counts the bytes that its calibrators send."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.calibration.statistics import split
from hasten.accel.costs.estimate import Estimate
from hasten.accel.outputs.resumable import PROGRESS
from hasten.cluster.actors.calibrator import Calibrator
from hasten.cluster.runtime.rates import measure
from hasten.jobs.bench.plan import NORMAL, SMALL, Compared
from hasten.jobs.bench.processes.runs import check_status
from hasten.jobs.bench.processes.watch import watched
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.quotes import word
from hasten.jobs.common.calibration import original
from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.compress.run import make_settings
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.dry_run.options import PlanConfig
from hasten.jobs.dry_run.run import make_plan

_INTERVAL_SECONDS = 1.0
# Process kinds of a plan, and their names in the process table.
_KINDS = {
    "driver": "driver",
    "calibrator": "Calibrator",
    "evaluation": "_evaluate",
    "verifier": "VerifierActor",
    "evaluator": "Evaluator",
}


def compare(model: str, folder: Path, job: str, size: str) -> Compared:
    """Plan and run a job with its small or normal options; folder: of the benchmark's run."""
    place = (folder / f"{job}-{size}").resolve()
    place.mkdir()
    chosen = (SMALL if size == "small" else NORMAL)[job]
    # The job runs in its own folder, which holds no earlier level database.
    path = Path(model).resolve() if Path(model).exists() else model
    options: dict[str, object] = {"target" if job == "decode" else "model": path, **chosen}
    output = {"evaluate": None, "decode": place / "completions.jsonl"}.get(job, place / "model")
    options |= {"run_dir": place / "run", "tracking.uri": f"sqlite:///{place / 'mlflow.db'}"}
    if output is not None:
        options["output"] = output
    words = [word(key, value) for key, value in options.items()]
    measure.cache_clear()
    composed = compose(job, jobs()[job].options, words)
    plan = make_plan(job, composed, PlanConfig())
    command = [sys.executable, "-P", "-m", "hasten", job, *words]
    environment = {"RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    usage = watched(command, place / "hasten.out", environment, _INTERVAL_SECONDS, place)
    check_status(usage, f"hasten {job}", place / "hasten.out")
    estimate: Estimate = plan.estimate
    moved = None
    # Only `compress`: the settings of other jobs are not at hand here.
    if isinstance(composed, CompressConfig):
        moved = estimate.moved["sums of second moments"], moved_bytes(composed)
    compared = Compared(
        job,
        size,
        {
            process.kind: (process.peak_bytes, usage.peaks[_KINDS[process.kind]].rss_bytes)
            for process in estimate.processes
            if _KINDS[process.kind] in usage.peaks
        },
        moved,
        None if output is None else (estimate.written_bytes, _bytes(output) + _bytes(place / "runs")),
        (plan.seconds, usage.seconds),
        (estimate.cpu_seconds, usage.cpu_seconds),
    )
    if output is not None and output.is_dir():
        shutil.rmtree(output)
    return compared


def moved_bytes(config: CompressConfig) -> int:
    """Bytes of Hessians that the calibrators of a job send, over all blocks: counted for the first block."""
    settings = make_settings(config, original(config.model))
    # Stages send the sums that one pass sends, each its own.
    settings = replace(settings, output=Path(f"{settings.output}{PROGRESS}-counted"), propagate="quantized")
    length = config.calibration.sequence_length
    tokens = torch.zeros(config.calibration.sequences, length, dtype=torch.long)
    chunks = dict(enumerate(tokens.tensor_split(min(settings.shards, len(tokens)))))
    task = Task(settings)
    total, keys = 0, [group.key for group in task.layer_groups[0]]
    for part in split(len(chunks), config.workers):
        calibrator = Calibrator(settings, {number: chunks[number] for number in part})
        total += sum(sums.nbytes for nodes in calibrator.collect(0, keys).sums.values() for *_, sums, _ in nodes)
    return total * task.architecture.num_blocks


def _bytes(output: Path) -> int:
    if output.is_file():
        return output.stat().st_size
    return sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
