"""`hasten cache`: measures KV-cache methods against the full cache."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from transformers import AutoConfig

from hasten.accel.cache.base import CacheBudget, check_budget
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import Drafting
from hasten.accel.cache.statistics import calibrated_in
from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.accel.evaluation import recall
from hasten.accel.models.checkpoint import resolve
from hasten.cluster.programs.caches import CacheInputs, CacheRow
from hasten.cluster.runtime.resources import cpu_seconds
from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.cache.rows import measured_rows
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.cache_methods import parse_method
from hasten.jobs.common.cache_statistics import chosen_statistics
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import cache_pareto
from hasten.jobs.common.prompts import with_draft
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.sizes import parse_bytes
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer, vocabulary_size

TEXT = "text"
_FULL = "full"


def run(config: CacheConfig) -> Path:
    """Measure every method at every budget; returns the path of report.json."""
    started = perf_counter()
    model = resolve(config.model).absolute()
    named = cache_rows(config, model)
    inputs = cache_inputs(config, model)
    output = Path(config.output or Path("runs", "caches", model.name)).expanduser().absolute()
    cpus = config.workers * config.threads
    reads = {"model": model}
    for text, row in named:
        if isinstance(row.method, Drafting) and row.method.draft is not None:
            reads[f"method={text}"] = Path(row.method.draft)
    with cluster_session(config, cpus, reads, {"output": output}):
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        with tracked(config, "cache", run_dir) as tracker:
            tracker.params(plain(config))
            found = measured_rows(inputs, named, output, config.workers, worker_resources(config), config.overwrite)
            table_rows = [
                {"method": name, **_budget_values(row.budget), "statistics": _given(row), **values}
                for (name, row), values in zip(named, found, strict=True)
            ]
            report = _report(config, table_rows, output, perf_counter() - started)
            tracker.metrics({key: value for key, value in report["metrics"].items() if value is not None})
            if TEXT in config.tasks:
                tracker.figure(cache_pareto(table_rows, run_dir / "pareto.png"))
            path = tracker.report(report)
    _print(table_rows)
    return path


def cache_rows(config: CacheConfig, model: Path) -> list[tuple[str, CacheRow]]:
    """The full cache, and every method at every budget; UserError names a wrong method or budget."""
    if not config.method or not (config.budget or config.budget_bytes):
        raise UserError(f"method={config.method} and budget={config.budget} must not be empty")
    budgets = [CacheBudget(value) for value in config.budget]
    budgets += [CacheBudget(parse_bytes("budget_bytes", text), in_bytes=True) for text in config.budget_bytes]
    rows = [(_FULL, CacheRow(Full(), None))]
    for text in dict.fromkeys(config.method):
        made = with_draft(parse_method(text), model)
        if isinstance(made, Full):
            continue
        # Methods without statistics may stand beside others.
        statistics = chosen_statistics(made, model, config.statistics if calibrated_in(made) else None)
        for budget in budgets if made.has_budget else [None]:
            check_budget(made, budget)
            rows.append((text, CacheRow(made, budget, statistics)))
    return rows


def check_tasks(config: CacheConfig) -> None:
    """UserError where a task does not exist."""
    known = (TEXT, *recall.TASKS)
    wrong = [task for task in config.tasks if task not in known]
    if wrong or not config.tasks:
        raise UserError(f"tasks={wrong[0] if wrong else '[]'} is none of {', '.join(known)}")


def _budget_values(budget: CacheBudget | None) -> Record:
    """Columns of a row."""
    if budget is None:
        return {"budget": None, "budget_bytes": None}
    own, other = ("budget_bytes", "budget") if budget.in_bytes else ("budget", "budget_bytes")
    return {own: budget.value, other: None}


def cache_inputs(config: CacheConfig, model: Path) -> CacheInputs:
    """Texts and samples; UserError where they do not fit the model."""
    check_tasks(config)
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
        if task != TEXT
    }
    device = resolve_device(config.device)
    windows = tokens if TEXT in config.tasks else None
    return CacheInputs(model, resolve_dtype(config.dtype, device), device, windows, config.context, samples)


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


def _given(row: CacheRow) -> str | None:
    return None if row.statistics is None else str(row.statistics)


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
        if row["budget_bytes"] is not None:
            budget = f"{row['budget_bytes'] / 2**10:g} KiB"
        cells.append([row["method"], budget, *text, *(f"{row[task]:.0%}" for task in tasks)])
    heads = ["method", "budget", "KL divergence", "same first token", "MiB held", "tokens/s"]
    print(table([*heads, *(task.removeprefix("recall_") for task in tasks)], cells))
