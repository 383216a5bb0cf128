"""`hasten search_cache`: finds what each layer's cache keeps, within a budget of bytes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from hasten.accel.cache.levels import uniform_divergence
from hasten.accel.cache.mixed import write
from hasten.accel.outputs.resumable import write_whole
from hasten.cluster.runtime.resources import cpu_seconds
from hasten.cluster.storage.naming import as_given
from hasten.jobs.common.cluster import cluster_session
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import cache_levels, cache_pareto
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.search_cache.allocation import CacheSearch
from hasten.jobs.search_cache.options import SearchCacheConfig

_UNIFORM = "uniform"
_BYTES = "cache_bytes_per_token"


def run(config: SearchCacheConfig) -> Path:
    """Measure levels, search, and measure the assignments on unseen text; returns the path of report.json."""
    started = perf_counter()
    search = CacheSearch(config)
    folders = {"model": search.model}, {"output": search.output}
    with cluster_session(config, config.workers * config.threads, *folders):
        run_dir = start(config)
        with tracked(config, "search_cache", run_dir) as tracker:
            tracker.params(plain(config))
            search.measure_levels()
            answers = [search.assign(budget, tracker) for budget in config.budget]
            rows = search.measured_rows(answers)
            budgets = [_compared(rows, answer.budget) for answer in answers]
            for answer, row in zip(answers, budgets, strict=True):
                path = run_dir / _file(answer.budget, len(answers))
                write_whole(path, partial(write, levels=search.levels, layers=answer.layers))
                row |= {"assignment": str(path), "layers": answer.layers}
                picture = run_dir / f"levels_{answer.budget:g}.png"
                tracker.figure(cache_levels(search.figure_rows(answer.layers), picture))
            tracker.figure(cache_pareto(_lines(rows, config.context), run_dir / "pareto.png"))
            report = _report(config, search, rows, budgets, perf_counter() - started)
            tracker.metrics({key: value for key, value in report["metrics"].items() if value is not None})
            path = tracker.report(report)
    _print(rows, budgets)
    return path


def _file(budget: float, count: int) -> str:
    return "assignment.json" if count == 1 else f"assignment_{budget:g}.json"


def _compared(rows: Sequence[Record], budget: float) -> dict[str, Any]:
    """The chosen assignment of a budget beside uniform levels.

    uniform_*: the best uniform level that holds no more bytes; None where none is so small. interpolated_*: see
    uniform_divergence, at the bytes of the assignment.
    """
    chosen = next(row for row in rows if row["budget"] == budget and row["is_chosen"])
    uniform = [row for row in rows if row["allocator"] == _UNIFORM]
    fitting = [row for row in uniform if row[_BYTES] <= chosen[_BYTES]]
    best = min(fitting, key=lambda row: row["kl_divergence"], default=None)
    largest = max(fitting, key=lambda row: row[_BYTES], default=None)
    points = [(row[_BYTES], row["kl_divergence"]) for row in uniform]
    names = ("kl_divergence", "perplexity", "top1_agreement", _BYTES)
    return {
        "budget": budget,
        **{name: chosen[name] for name in names},
        "uniform_level": best and best["method"],
        "uniform_kl_divergence": best and best["kl_divergence"],
        "largest_uniform_level": largest and largest["method"],
        "largest_uniform_kl_divergence": largest and largest["kl_divergence"],
        "interpolated_kl_divergence": uniform_divergence(points, chosen[_BYTES]),
    }


def _lines(rows: Sequence[Record], context: int) -> list[Record]:
    """Rows of the figure: a line of the uniform levels and one of each allocator, by the bytes behind the prompt."""
    return [{**row, "method": row["allocator"], "bytes_end": row[_BYTES] * context} for row in rows]


def _report(
    config: SearchCacheConfig, search: CacheSearch, rows: Sequence[Record], budgets: Sequence[Record], seconds: float
) -> Record:
    first = {key: value for key, value in budgets[0].items() if not isinstance(value, str | list) and key != "budget"}
    return {
        "job": "search_cache",
        "config": plain(config),
        "metrics": {
            **first,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds(),
            "peak_rss_bytes": search.peak_rss_bytes or None,
        },
        "budgets": list(budgets),
        "levels": search.level_rows(),
        "rows": list(rows),
        "output": str(search.output),
    }


def _print(rows: Sequence[Record], budgets: Sequence[Record]) -> None:
    cells = [
        [
            row["allocator"],
            "–" if row["budget"] is None else f"{row['budget']:g}",
            row["method"],
            f"{row['cache_bytes_per_token']:.1f}",
            f"{row['kl_divergence']:.5f}",
            f"{row['top1_agreement']:.1%}",
        ]
        for row in rows
    ]
    print(table(["allocator", "budget", "levels", "bytes a token", "KL divergence", "same first token"], cells))
    for row in budgets:
        print(
            f"at {row['cache_bytes_per_token']:.1f} bytes a token: KL divergence {row['kl_divergence']:.5f}, between "
            f"uniform levels {row['interpolated_kl_divergence']:.5f}"
        )
        print(f"assignment: {as_given(row['assignment'])}")
