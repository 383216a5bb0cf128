"""Rows of measured caches, each a file: what is there is not measured again."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hasten.accel.cache.prompt.base import Drafting
from hasten.accel.data.tokens import fingerprint
from hasten.accel.evaluation import recall
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.code_fingerprint import code_fingerprint
from hasten.accel.outputs.resumable import digest, write_whole
from hasten.cluster.programs import caches
from hasten.cluster.programs.caches import CacheInputs, CacheRow, measure_caches
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.cache_statistics import statistics_fingerprint
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record

_LOG = logging.getLogger(__name__)


def measured_rows(
    inputs: CacheInputs,
    named: Sequence[tuple[str, CacheRow]],
    output: Path,
    workers: int,
    needs: ActorResources,
    overwrite: bool = False,
) -> list[Record]:
    """What was measured of each row, in the order of the rows; inside a Ray session.

    output: folder of the files, each named after everything that its row depends on.
    """
    files = [row_file(output, inputs, row) for _, row in named]
    missing = [place for place, file in enumerate(files) if overwrite or not file.exists()]
    if len(missing) < len(named):
        _LOG.info("%d of %d rows are in %s already", len(named) - len(missing), len(named), output)
    output.mkdir(parents=True, exist_ok=True)
    count = len(named) - len(missing)
    with Progress("cache", len(named), "row") as progress:
        progress.begin(count)

        def done(number: int, found: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            place = missing[number]
            write_row(files[place], found)
            progress.update(count, f"{named[place][0]} {_short(found)}")

        if missing:
            measure_caches(inputs, [named[place][1] for place in missing], workers, needs, done)
    return [json.loads(file.read_text()) for file in files]


def row_file(folder: Path, inputs: CacheInputs, row: CacheRow) -> Path:
    """File of a measured row, named after everything that the row depends on."""
    return folder / f"{digest(_key(inputs, row))[:24]}.json"


def write_row(file: Path, found: Record) -> None:
    """Write a row whole or not at all."""
    write_whole(file, partial(Path.write_text, data=json.dumps(found)))


def _key(inputs: CacheInputs, row: CacheRow) -> Record:
    """Everything that a row depends on."""
    made, draft = row.method, dict[str, object]()
    if isinstance(made, Drafting) and made.draft is not None:
        draft = {"draft": Checkpoint(Path(made.draft)).fingerprint()}
        made = replace(made, draft=None)
    return {
        **draft,
        "model": Checkpoint(inputs.model).fingerprint(),
        "method": repr(made),
        "budget": None if row.budget is None else repr(row.budget),
        "statistics": statistics_fingerprint(row.method, row.statistics),
        "windows": None if inputs.windows is None else fingerprint(inputs.windows),
        "context": inputs.context,
        "recall": digest(repr(inputs.recall)),
        "dtype": str(inputs.dtype),
        "device": inputs.device,
        "torch": torch.__version__,
        "code": code_fingerprint(row.method, caches, recall),
    }


def _short(found: Record) -> str:
    return "" if "kl_divergence" not in found else f"KL divergence {found['kl_divergence']:.4f}"
