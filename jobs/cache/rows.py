"""Rows of measured caches, each a file: what is there is not measured again."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hasten.accel.cache.base import CacheBudget, CacheLevel, CacheMethod, check_budget
from hasten.accel.cache.prompt.base import Drafting
from hasten.accel.compression.outputs.code_fingerprint import code_fingerprint
from hasten.accel.compression.outputs.resumable import digest, write_whole
from hasten.accel.data.tokens import fingerprint
from hasten.accel.errors import UserError
from hasten.accel.evaluation import recall
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.programs import caches
from hasten.cluster.programs.caches import CacheInputs, CacheRow, measure_caches
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.cli.methods import build, method, method_names, target_of
from hasten.jobs.common.cache_statistics import statistics_fingerprint
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record

_LOG = logging.getLogger(__name__)
_BUDGET = "budget"


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
    files = [output / f"{digest(_key(inputs, row))[:24]}.json" for _, row in named]
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
            write_whole(files[place], partial(Path.write_text, data=json.dumps(found)))
            progress.update(count, f"{named[place][0]} {_short(found)}")

        if missing:
            measure_caches(inputs, [named[place][1] for place in missing], workers, needs, done)
    return [json.loads(file.read_text()) for file in files]


def parse_method(text: str) -> CacheMethod:
    """Method of a text like `kivi` or `kivi:bits=4,block=64`."""
    name, fields = _parsed("method", text)
    made: CacheMethod = build(_settings("method", text, name, fields))
    return made


def parse_level(text: str) -> CacheLevel:
    """Method and budget of a text like `kivi:bits=4` or `snapkv:budget=0.25`."""
    name, fields = _parsed("levels", text)
    budget = _budget(text, fields.pop(_BUDGET)) if _BUDGET in fields else None
    made: CacheMethod = build(_settings("levels", text, name, fields))
    if made.has_budget and budget is None:
        raise UserError(f"levels={text} keeps a budget: write {text}{',' if fields else ':'}budget=0.25, or tokens")
    check_budget(made, budget)
    return CacheLevel(made, budget)


def _budget(text: str, value: object) -> CacheBudget:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"levels={text}: budget={value} is no number")
    return CacheBudget(value)


def _parsed(option: str, text: str) -> tuple[str, dict[str, object]]:
    """Name and fields of `NAME:FIELD=VALUE,FIELD=VALUE`; UserError names the option."""
    name, _, given = text.partition(":")
    known = method_names("cache")
    if name not in known:
        raise UserError(f"{option}={name} is none of {', '.join(known)}")
    texts = [field.name for field in method("cache", name).fields if field.kind is str]
    fields: dict[str, object] = {}
    for item in filter(None, given.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise UserError(f"{option}={text} has {item!r}: expected NAME:FIELD=VALUE,FIELD=VALUE")
        try:
            fields[key] = value if key in texts and value != "null" else json.loads(value)
        except ValueError:
            raise UserError(f"{option}={text}: {key}={value} is no number, true or false") from None
    return name, fields


def _settings(option: str, text: str, name: str, fields: dict[str, object]) -> Record:
    own = [field.name for field in method("cache", name).fields]
    if not set(fields) <= set(own):
        raise UserError(f"{option}={text} is wrong: {name} has {', '.join(own) or 'no hyper-parameters'}")
    return {"_target_": target_of("cache", name), **fields}


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
        "statistics": statistics_fingerprint(row.statistics),
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
