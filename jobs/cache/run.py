"""`hasten cache`: measures KV-cache methods against the full cache."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig

from hasten.accel.cache.base import CacheBudget, CacheMethod, check_budget
from hasten.accel.cache.full import Full
from hasten.accel.compression.outputs.code_fingerprint import code_fingerprint
from hasten.accel.compression.outputs.resumable import digest, write_whole
from hasten.accel.data.tokens import fingerprint, load_tokens
from hasten.accel.errors import UserError
from hasten.accel.evaluation import recall
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.cluster.programs import caches
from hasten.cluster.programs.caches import CacheInputs, CacheRow, measure_caches
from hasten.cluster.runtime.resources import cpu_seconds
from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.cli.methods import build, method, method_names, target_of
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import cache_pareto
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer, vocabulary_size

_LOG = logging.getLogger(__name__)
_TEXT = "text"
_FULL = "full"


def run(config: CacheConfig) -> Path:
    """Measure every method at every budget; returns the path of report.json."""
    started = perf_counter()
    model = resolve(config.model).absolute()
    named = cache_rows(config)
    inputs = cache_inputs(config, model)
    output = Path(config.output or Path("runs", "caches", model.name)).expanduser().absolute()
    files = [output / f"{digest(_key(config, inputs, row))[:24]}.json" for _, row in named]
    missing = [place for place, file in enumerate(files) if config.overwrite or not file.exists()]
    cpus = config.workers * config.threads
    with cluster_session(config, cpus, {"model": model}, {"output": output}):
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        with tracked(config, "cache", run_dir) as tracker:
            tracker.params(plain(config))
            if len(missing) < len(named):
                _LOG.info("%d of %d rows are in %s already", len(named) - len(missing), len(named), output)
            output.mkdir(parents=True, exist_ok=True)
            with Progress("cache", len(named), "row") as progress:
                progress.begin(len(named) - len(missing))
                count = len(named) - len(missing)

                def done(number: int, found: dict[str, Any]) -> None:
                    nonlocal count
                    count += 1
                    place = missing[number]
                    write_whole(files[place], partial(Path.write_text, data=json.dumps(found)))
                    progress.update(count, f"{named[place][0]} {_short(found)}")

                if missing:
                    rows = [named[place][1] for place in missing]
                    measure_caches(inputs, rows, config.workers, worker_resources(config), done)
            table_rows = [
                {"method": name, "budget": row.budget, **json.loads(file.read_text())}
                for (name, row), file in zip(named, files, strict=True)
            ]
            report = _report(config, table_rows, output, perf_counter() - started)
            tracker.metrics({key: value for key, value in report["metrics"].items() if value is not None})
            if _TEXT in config.tasks:
                tracker.figure(cache_pareto(table_rows, run_dir / "pareto.png"))
            path = tracker.report(report)
    _print(table_rows)
    return path


def cache_rows(config: CacheConfig) -> list[tuple[str, CacheRow]]:
    """The full cache, and every method at every budget; UserError names a wrong method or budget."""
    if not config.method or not config.budget:
        raise UserError(f"method={config.method} and budget={config.budget} must not be empty")
    budgets = [CacheBudget(value).value for value in config.budget]
    rows = [(_FULL, CacheRow(Full(), None))]
    for text in dict.fromkeys(config.method):
        made = parse_method(text)
        if isinstance(made, Full):
            continue
        for budget in budgets if made.has_budget else [None]:
            check_budget(made, None if budget is None else CacheBudget(budget))
            rows.append((text, CacheRow(made, budget)))
    return rows


def parse_method(text: str) -> CacheMethod:
    """Method of a text like `kivi` or `kivi:bits=4,block=64`."""
    name, _, given = text.partition(":")
    known = method_names("cache")
    if name not in known:
        raise UserError(f"method={name} is none of {', '.join(known)}")
    fields: dict[str, object] = {"_target_": target_of("cache", name)}
    for item in filter(None, given.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise UserError(f"method={text} has {item!r}: expected NAME:FIELD=VALUE,FIELD=VALUE")
        own = [field.name for field in method("cache", name).fields]
        if key not in own:
            raise UserError(f"method={text} is wrong: {name} has {', '.join(own) or 'no hyper-parameters'}")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            raise UserError(f"method={text}: {key}={value} is no number, true or false") from None
    made: CacheMethod = build(fields)
    return made


def cache_inputs(config: CacheConfig, model: Path) -> CacheInputs:
    """Texts and samples; UserError where they do not fit the model."""
    known = (_TEXT, *recall.TASKS)
    wrong = [task for task in config.tasks if task not in known]
    if wrong or not config.tasks:
        raise UserError(f"tasks={wrong[0] if wrong else '[]'} is none of {', '.join(known)}")
    limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    needed = config.context + max(config.new_tokens, 64)
    if limit is not None and needed > limit:
        raise UserError(f"context={config.context} is too long: with what follows it, {needed} of {limit} positions")
    tokenizer, vocabulary = load_tokenizer(model, config.template), vocabulary_size(model)
    if tokenizer is None:
        raise UserError(f"model={config.model} has no tokenizer, which texts and recall tasks need")
    tokens = load_tokens(
        config.source,
        tokenizer,
        max(config.sequences, 1),
        config.context + config.new_tokens,
        split="held_out",
        seed=config.seed,
        vocabulary=vocabulary,
        begin=begin_of(model, tokenizer, config.bos),
    )
    text = str(tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=True))
    # Enough lines for any context.
    text *= 2 + config.context * 2 // max(1, tokens.numel())

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False).input_ids
        return ids

    samples = {
        task: recall.samples(task, encode, text, config.context, config.samples, config.seed)
        for task in config.tasks
        if task != _TEXT
    }
    device = resolve_device(config.device)
    windows = tokens if _TEXT in config.tasks else None
    return CacheInputs(model, windows, config.context, samples, resolve_dtype(config.dtype, device), device)


def _key(config: CacheConfig, inputs: CacheInputs, row: CacheRow) -> Record:
    """Everything that a row depends on."""
    return {
        "model": Checkpoint(inputs.model).fingerprint(),
        "method": repr(row.method),
        "budget": row.budget,
        "windows": None if inputs.windows is None else fingerprint(inputs.windows),
        "context": inputs.context,
        "recall": digest(repr(inputs.recall)),
        "dtype": str(inputs.dtype),
        "device": inputs.device,
        "torch": torch.__version__,
        "code": code_fingerprint(row.method, caches, recall),
    }


def _report(config: CacheConfig, rows: Sequence[Record], output: Path, seconds: float) -> Record:
    # The first row that is not the full cache.
    first = rows[1] if len(rows) > 1 else rows[0]
    recalls = [value for key, value in first.items() if key.startswith("recall_")]
    names = ("kl_divergence", "perplexity", "top1_agreement", "bytes_end", "tokens_per_second")
    return {
        "job": "cache",
        "config": plain(config),
        "metrics": {
            **{name: first.get(name) for name in names},
            "recall": sum(recalls) / len(recalls) if recalls else None,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds(),
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
        },
        "rows": list(rows),
        "output": str(output),
    }


def _short(found: Record) -> str:
    return "" if "kl_divergence" not in found else f"KL divergence {found['kl_divergence']:.4f}"


def _print(rows: Sequence[Record]) -> None:
    tasks = [key for key in rows[0] if key.startswith("recall_")]
    cells = []
    for row in rows:
        text = ["–"] * 4
        if "kl_divergence" in row:
            speed = row["tokens_per_second"]
            text = [
                f"{row['kl_divergence']:.4f}",
                f"{row['top1_agreement']:.1%}",
                f"{row['bytes_end'] / 2**20:.3f}",
                "–" if speed is None else f"{speed:.1f}",
            ]
        budget = "–" if row["budget"] is None else f"{row['budget']:g}"
        cells.append([row["method"], budget, *text, *(f"{row[task]:.0%}" for task in tasks)])
    heads = ["method", "budget", "KL divergence", "same first token", "MiB held", "tokens/s"]
    print(table([*heads, *(task.removeprefix("recall_") for task in tasks)], cells))
