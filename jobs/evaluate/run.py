"""`hasten evaluate`: measures a checkpoint's quality, size and divergence from its original."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from hasten.accel.data.documents import LIBRARY
from hasten.accel.errors import UserError
from hasten.accel.evaluation.gates import Gate
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.evaluation.tasks import check_tasks
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.resumable import original_of, source_name
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.programs.evaluation import check_weights
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.remote import is_uri
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.gates import check_gates, compared_tasks, judge, print_gates, task_metrics, tasks_of
from hasten.jobs.common.quality import FIGURES, measured, print_warnings, quality_warnings
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.storage import copied
from hasten.jobs.common.target_group import block_division, check_target
from hasten.jobs.common.texts import Texts, print_texts, recorded_origin
from hasten.jobs.evaluate.options import EvaluateConfig

_LOG = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> Path:
    """Measure config.model; returns the path of report.json."""
    started = perf_counter()
    # Absolute, since workers on a cluster have other current folders.
    folder = resolve(config.model).absolute()
    checkpoint = Checkpoint(folder)
    original = _original(config, checkpoint)
    if config.tasks:
        check_tasks(config.tasks)
    gates = check_gates(config.gate, config.evaluation.sequences, original is not None, config.tasks)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    reads = {"model": folder} | ({} if original is None else {"original": original})
    folders = list(reads.values())
    division = _division(config, folders)
    if config.evaluation.sequences:
        for path in folders:
            Architecture(Checkpoint(path))  # reads no weights, but refuses models that cannot be run
    texts, windows = _texts(config, folder)
    with ExitStack() as stack:
        if windows is not None:
            group = config.target_group
            cpus = config.workers * config.threads * group.size
            # Groups are actors, which run at the same time.
            in_turn = division is None
            stack.enter_context(cluster_session(config, cpus, reads, {}, in_turn=in_turn, group=group))
            check_weights(folders, config.workers, config.threads)
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        tracker = stack.enter_context(tracked(config, "evaluate", run_dir))
        tracker.params(plain(config))
        metrics: Record = dict.fromkeys(FIGURES)
        peak = 0
        if windows is not None:
            quality, peak = _measure(config, folder, original, windows, dtype, device, division)
            metrics |= quality
        metrics |= sizes(checkpoint).metrics()
        if original is not None:
            metrics["bytes_original"] = sizes(Checkpoint(original)).disk_bytes
        metrics |= _tasks(config, gates, folder, original, device)
        metrics |= {
            "seconds": perf_counter() - started,
            "cpu_seconds": metrics.pop("workers_cpu_seconds", 0.0) + cpu_seconds(),
            "peak_rss_bytes": max(peak, peak_rss_bytes()),
        }
        report = {
            "job": "evaluate",
            "config": plain(config) | {"original": str(original) if original else None},
            "metrics": metrics,
            "layers": _layers(checkpoint),
            "output": str(folder),
            # A model that is not compressed is its own original.
            **texts.report(original if original or checkpoint.is_compressed else folder),
        }
        report["warnings"] = quality_warnings(metrics, report["texts"])
        report["gates"] = judge(gates, metrics, partial(_errors, checkpoint, original))
        tracker.metrics(metrics)
        path = tracker.report(report)
    _print_summary(metrics)
    print_texts(report)
    print_warnings(report)
    print_gates(report)
    return path


def _texts(config: EvaluateConfig, folder: Path) -> tuple[Texts, Windows | None]:
    """Windows to measure on, by default a part of the text that the checkpoint was calibrated on, else of library."""
    origin = recorded_origin(folder)
    texts = Texts(folder, config.bos, config.template, origin and replace(origin, text=None), config.cache_folder)
    try:
        return texts, texts.evaluate(config.evaluation)
    except UserError as error:
        if config.evaluation.source is not None or origin is None or origin.source == LIBRARY:
            raise
        _LOG.warning("evaluation.source=library, since the checkpoint's calibration leaves no text: %s", error)
    texts = Texts(folder, config.bos, config.template)
    return texts, texts.evaluate(config.evaluation)


def _original(config: EvaluateConfig, checkpoint: Checkpoint) -> Path | None:
    if config.original is not None:
        return resolve(config.original).absolute()
    uri = source_name(checkpoint.path)
    if uri is not None and is_uri(uri):
        try:
            copy = copied("original", uri, config.cache_folder)
            recorded = copy if copy.is_dir() else None
        except UserError as error:  # the user did not ask for the comparison
            _LOG.warning("%s", error)
            recorded = None
    else:
        recorded = original_of(checkpoint.path)
    if checkpoint.is_compressed and recorded is None:
        _LOG.warning("the original of %s is not known: give original=PATH to measure the divergence", checkpoint.path)
    return recorded


def _division(config: EvaluateConfig, folders: Sequence[Path]) -> Division | None:
    """The division of the checkpoints; UserError where they cannot be divided so, and for tasks of lm-eval."""
    division = block_division(config.target_group)
    if division is not None and config.tasks:
        raise UserError(
            f"tasks=[{','.join(config.tasks)}] are run by lm-eval, in one process that holds the whole model: leave "
            "target_group out, or tasks"
        )
    for folder in folders:
        check_target(folder, division)
    return division


def _measure(
    config: EvaluateConfig,
    folder: Path,
    original: Path | None,
    windows: Windows,
    dtype: torch.dtype,
    device: str,
    division: Division | None,
) -> tuple[Record, int]:
    needs = worker_resources(config)
    quality = measured(
        folder,
        original,
        windows,
        config.workers,
        needs,
        device,
        dtype,
        config.batch,
        batch_option="batch",
        division=division,
    )
    return quality.sums.metrics() | {"workers_cpu_seconds": quality.cpu_seconds}, quality.peak_rss_bytes


def _tasks(
    config: EvaluateConfig, gates: Sequence[Gate], folder: Path, original: Path | None, device: str
) -> dict[str, float]:
    """Metrics of lm-eval's tasks, named TASK.METRIC, and changes of those that gates name."""
    gated = tasks_of(gates)
    others = [task for task in config.tasks if task not in gated]
    metrics = task_metrics(others, folder, device, config.batch)
    if original is None:
        return metrics
    return metrics | compared_tasks(gates, [folder], original, device, config.batch)[0]


def _errors(checkpoint: Checkpoint, original: Path | None) -> list[Record]:
    """Relative error of the weights of every quantized layer."""
    if original is None:
        return []
    rows, reference = [], Checkpoint(original)
    for name in checkpoint.names:
        if checkpoint.quantization(name) is not None:
            weight = reference.tensor(name).double()
            error = (weight - checkpoint.tensor(name).double()).square().sum() / weight.square().sum()
            rows.append({"layer": name.removesuffix(".weight"), "error": float(error)})
    return rows


def _layers(checkpoint: Checkpoint) -> list[Record]:
    """Exact size of every quantized layer."""
    rows = []
    for name in checkpoint.names:
        arguments = checkpoint.quantization(name)
        if arguments is not None:
            rows_, columns = checkpoint.shape(name)
            stored = checkpoint.stored_bytes(name) * 8
            rows.append(
                {
                    "layer": name.removesuffix(".weight"),
                    "bits": arguments.num_bits,
                    "weights": rows_ * columns,
                    "stored_bits": stored,
                    "bits_per_weight": stored / (rows_ * columns),
                }
            )
    return rows


def _print_summary(metrics: Record) -> None:
    print(f"size: {metrics['bytes'] / 2**20:.1f} MiB, {metrics['bits_per_weight']:.3f} bits per weight")
    if metrics["perplexity"] is not None:
        print(f"perplexity: {metrics['perplexity']:.4f} over {metrics['tokens']} tokens")
    if metrics["kl_divergence"] is not None:
        print(
            f"against the original: perplexity {metrics['perplexity_original']:.4f}, "
            f"KL divergence {metrics['kl_divergence']:.5f} nats a token, "
            f"same first token {metrics['top1_agreement']:.1%}"
        )
    for name, value in metrics.items():
        if "." in name:
            print(f"{name}: {value:.4f}")
