"""Shared by jobs that calibrate: checkpoint and settings, and the calibration pass with its progress."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration.expert_tokens import described as described_tokens
from hasten.accel.compression.calibration.group_sizes import AUTO_SIZES, described, layers_of_sizes
from hasten.accel.compression.calibration.layer_groups import Group, group_sizes
from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.quantizers.base import AUTO
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.outputs.resumable import ResumableFolder
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.methods import build, build_all
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import KV_CACHES, Calibrated
from hasten.jobs.common.texts import Origin, record_origin

_LOG = logging.getLogger(__name__)


def original(model: str) -> Path:
    """Folder of the checkpoint to compress; UserError if it is not complete."""
    # Absolute, since workers on a cluster have other current folders.
    source = resolve(model).absolute()
    # Checked before transformers reads the folder, whose errors span many lines.
    title = Checkpoint(source).quantization_title
    if title is not None:
        _LOG.warning("%s is quantized (%s): its dequantized weights are this run's original", as_given(source), title)
    return source


def calibration_settings(config: Calibrated, source: Path, output: Path, **chosen: Any) -> Settings:
    """Settings of a calibration pass: those of the common options, and `chosen` ones."""
    device = resolve_device(config.device)
    return Settings(
        checkpoint=source,
        output=output.expanduser().absolute(),
        format=CompressedTensors(),
        ignore=tuple(config.ignore),
        skip_first=config.skip_first,
        skip_last=config.skip_last,
        propagate=config.propagate,
        dtype=resolve_dtype(config.dtype, device),
        device=device,
        threads=config.threads,
        batch=config.calibration.batch,
        shards=config.calibration.shards,
        expert_tokens=config.calibration.expert_tokens,
        all_experts=config.calibration.all_experts,
        observer=build(config.input_observer),
        attention=attention_scheme(config),
        transforms=build_all("transform", config.transforms, config.transform),
        **chosen,
    )


def print_expert_tokens(report: Mapping[str, Any]) -> None:
    """Print how many calibration tokens experts saw, where the model has any and methods use statistics."""
    summary = report["expert_tokens"]
    if summary is not None and summary["most"]:
        print(f"tokens per expert: {described_tokens(summary)}")


def attention_scheme(config: Calibrated) -> AttentionScheme | None:
    """How keys, values and queries are rounded; UserError where queries are without keys and values."""
    if config.kv_cache is None:
        if config.attention is not None:
            given = f"attention={config.attention} with kv_cache=null"
            raise UserError(f"{given}: queries are rounded for a cache in FP8, give kv_cache={' or '.join(KV_CACHES)}")
        return None
    return AttentionScheme(KV_CACHES[config.kv_cache], config.attention is not None)


def log_group_sizes(levels: Sequence[Level], layer_groups: Iterable[Iterable[Group]]) -> None:
    """Log the sizes that a group size of `auto` stands for, where a level has it."""
    automatic = [level for level in levels if uses_auto(level)]
    if not automatic:
        return
    sizes = group_sizes(automatic[0], layer_groups)
    _LOG.info("group sizes: %s", described(layers_of_sizes(sizes)))
    odd = [layer for layer, size in sizes.items() if size == -1]
    if odd:
        names = ", ".join(map(str, AUTO_SIZES))
        _LOG.warning("none of %s divides the columns of %d layers, first %s: one scale a row", names, len(odd), odd[0])


def uses_auto(level: Level) -> bool:
    """Whether the group size of a level is `auto`."""
    return level.loader_scheme is not None and level.loader_scheme.weights.group_size == AUTO


def open_output(output: ResumableFolder, fingerprint: Record, overwrite: bool, origin: Origin) -> None:
    """Open an output that is written block by block, and record in it the text that it is calibrated on.

    Logs settings that differ from the run that began it.
    """
    output.source_name = as_given(output.source_name)
    output.open(fingerprint, overwrite)
    record_origin(output, origin)
    for change in output.changed(fingerprint):
        _LOG.warning("%s=%s continues with another %s; the last bits may differ", output.option, output.path, change)


def run_pass(compression: CalibrationPass, title: str, tracker: Tracker) -> None:
    """Run a calibration pass with a progress bar; each block is a step of the tracked run."""
    count, output = len(compression.task.layer_groups), compression.task.output
    finished = len(output.finished)
    if finished:
        _LOG.info("%d of %d blocks are finished already in %s", finished, count, output.path)
    with Progress(title, count, "block") as progress:
        progress.begin(finished)

        def note(count: int, row: Record) -> None:
            progress.update(finished + count, f"error {row['error']:.2e}")
            tracker.metrics({"block_error": row["error"], "block_seconds": row["seconds"]}, step=row["block"])

        compression.run(note)
