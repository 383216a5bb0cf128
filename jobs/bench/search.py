"""Allocators and EvoPress on one checkpoint: quality at every budget, with and without grouping, and the cost."""

import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import ParetoRow, Report, hasten_job
from hasten.jobs.cli.methods import method_names
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, SOURCE, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "search: a budget of bits spread over the layers"
_SEQUENCES = 8
_SEQUENCE_LENGTH = 512
_BASELINE = "random_search"
# The search whose cost the peer published, with its schedule; five levels.
_PUBLISHED = {"errors": "output", "grouping": "none", "budget": 3.125, "search.sequences": _SEQUENCES}
_SCHEDULE = {
    "allocator.generations": 10,
    "allocator.offspring": 12,
    "allocator.survivors": "[4,2,1]",
    "allocator.tokens": "[512,1024,4096]",
}


@dataclass
class Config(Run):
    """Search at several budgets; the grids are symmetric, in groups of 128."""

    model: str = option("embedded:target", f"what is compressed: {MODEL}")
    source: str = option("library", f"text that layers are calibrated on: {SOURCE}")
    search_source: str | None = option(
        None, f"text that candidates are compared on: {SOURCE}; null is another part of source"
    )
    held_out: str | None = option(None, f"text that quality is measured on: {SOURCE}; null is another part of source")
    windows: int = option(32, "held-out windows of 512 tokens", at_least=1)
    budgets: list[float] = option([2.25, 2.5, 3.0, 4.0], "average bits of a weight, scales counted")
    calibration_sequences: int = option(128, "calibration sequences of 512 tokens", at_least=1)
    groupings: list[str] = option(["none", "serving"], "rules of which layers share a level, a table each")
    generations: int = option(12, "generations of the searches in the table", at_least=1)
    tokens: list[int] = option([1024, 4096, 16384], "tokens of the steps of their selection")
    search_sequences: int = option(64, "sequences of 512 tokens that those are drawn from", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    evopress: str | None = option(
        None, "checkout of github.com/IST-DASLab/EvoPress, whose search is timed beside ours; null leaves it out"
    )
    peer_python: str | None = option(None, "Python with torch and transformers that runs it; null is this one")
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


class Measured(TypedDict):
    """Rows of the allocator table by grouping, and the report's metrics."""

    tables: dict[str, list[ParetoRow]]
    metrics: dict[str, float]


def run(config: Config) -> Path:
    """Path of the report; the tables are printed and written to the document."""
    folder = start(config)
    with tracked(config, "bench search", folder) as tracker:
        tracker.params(plain(config))
        measured = _measure(config, folder)
        publish(config.document, folder, HEADING, _section(config, measured))
        report = {
            "job": "bench search",
            "config": plain(config),
            "metrics": measured["metrics"],
            "pareto": measured["tables"],
            "output": str(folder),
        }
        return tracker.report(report)


def _measure(config: Config, folder: Path) -> Measured:
    if config.evopress is not None and not Path(config.evopress, "evo_quant_search.py").is_file():
        raise UserError(f"evopress={config.evopress} is no checkout of EvoPress: it has no evo_quant_search.py")
    calibrated = {
        "model": config.model,
        "calibration.source": config.source,
        "calibration.sequences": config.calibration_sequences,
        "workers": 1,
        "threads": config.threads,
    }
    once, _ = hasten_job(
        "compress",
        folder / "gptq",
        {**calibrated, "bits": 3, "symmetric": "true", "evaluation.sequences": 0, "overwrite": "true"},
    )
    levels = {}
    for name, bits in (("levels", "[2,3,4,5,6,8]"), ("five", "[2,3,4,5,6]")):
        _LOG.info("levels %s", bits)
        levels[name], _ = hasten_job("levels", folder / name, {**calibrated, "bits": bits, "overwrite": "true"})
    searched = {
        "model": config.model,
        "threads": config.threads,
        "search.source": config.search_source or "null",
        "search.sequences": config.search_sequences,
        "evaluation.source": config.held_out or "null",
        "evaluation.sequences": config.windows,
        "overwrite": "true",
    }
    tables = {
        grouping: _table(config, folder / grouping, {**searched, "levels": folder / "levels" / "model"}, grouping)
        for grouping in config.groupings
    }
    published = {**searched, **_PUBLISHED, "levels": folder / "five" / "model"}
    runs = {}
    for workers in (1, 2):
        _LOG.info("the published search, %d evaluators", workers)
        # Saved states of the earlier search would be resumed instead of searching again.
        shutil.rmtree(folder / "five" / "model" / "searches", ignore_errors=True)
        options = {**published, **_SCHEDULE, "workers": workers}
        runs[workers], _ = hasten_job("search", folder / f"published-{workers}", options)
    _LOG.info("random search of as many measured tokens")
    baseline = {**published, **_baseline(_SCHEDULE, _SEQUENCES), "workers": 1}
    others = {_BASELINE: hasten_job("search", folder / _BASELINE, baseline)[0]}
    for name in ("uniform", "exact"):
        measured = {"allocator": name, "errors": "kl_scaled", "search.error_sequences": 1, "workers": 1}
        others[name], _ = hasten_job("search", folder / name, {**published, **measured})
    metrics = _metrics(once, levels, runs, others)
    if config.evopress is not None:
        metrics |= _peer(config, folder)
    return {"tables": tables, "metrics": metrics}


def _peer(config: Config, folder: Path) -> dict[str, float]:
    """The published search by its own code, on the levels and the text of ours: its cost and its divergence."""
    # torch: `hasten bench search --help` must not wait for it.
    from hasten.jobs.bench.measurements.published_search import PublishedSearch

    _LOG.info("the published search by its own code")
    search = PublishedSearch(
        config.model, folder / "five" / "model", config.search_source, _SEQUENCES, folder / "evopress"
    )
    options = {name.removeprefix("allocator."): str(value).strip("[]") for name, value in _SCHEDULE.items()}
    options["step_tokens"] = options.pop("tokens")
    # Scales are no part of what the peer counts.
    result = search.run(config.peer_python or sys.executable, str(config.evopress), {"bits": 3, **options})
    return {
        "peer_search_cpu_seconds": result["cpu_seconds"],
        "peer_kl": search.held_out(result["levels"], config.held_out, config.windows),
        "peer_bytes_per_weight": result["bytes_per_weight"],
    }


def _table(config: Config, folder: Path, options: Mapping[str, object], grouping: str) -> list[ParetoRow]:
    _LOG.info("all allocators, grouping=%s", grouping)
    others = ",".join(name for name in method_names("allocator") if name != _BASELINE)
    chosen = {
        "budget": f"[{','.join(f'{budget:g}' for budget in config.budgets)}]",
        "grouping": grouping,
        "allocator.generations": config.generations,
        "allocator.tokens": f"[{','.join(map(str, config.tokens))}]",
        "workers": 2,
        "compare": f"[{others}]",
    }
    report, _ = hasten_job("search", folder, {**options, **chosen})
    rows = report["pareto"]
    _LOG.info("random search of as many measured tokens, grouping=%s", grouping)
    shared = {name: value for name, value in chosen.items() if not name.startswith("allocator.")}
    shared |= _baseline(chosen, config.search_sequences) | {"compare": f"[{_BASELINE}]"}
    report, _ = hasten_job("search", folder / _BASELINE, {**options, **shared})
    return rows + report["pareto"]


def _baseline(evopress: Mapping[str, object], sequences: int) -> dict[str, object]:
    """Options of a random search of as many measured tokens as EvoPress by these options takes."""
    # torch: `hasten bench search --help` must not wait for it.
    from hasten.jobs.bench.measurements.random_baseline import random_search_options

    return random_search_options(evopress, sequences * _SEQUENCE_LENGTH)


def _metrics(
    once: Report, levels: Mapping[str, Report], runs: Mapping[int, Report], others: Mapping[str, Report]
) -> dict[str, float]:
    one, two, made = runs[1]["metrics"], runs[2]["metrics"], levels["levels"]["metrics"]
    random = others[_BASELINE]["metrics"]
    uniform, exact = others["uniform"]["metrics"]["kl_divergence"], others["exact"]["metrics"]
    return {
        "gptq_cpu_seconds": once["metrics"]["cpu_seconds"],
        "levels_cpu_seconds": made["cpu_seconds"],
        "levels_ratio": made["cpu_seconds"] / once["metrics"]["cpu_seconds"],
        "bytes_per_weight": levels["five"]["metrics"]["bytes_per_weight"],
        "search_cpu_seconds": one["cpu_seconds"],
        "kl_uniform": uniform,
        "kl_search": one["kl_divergence"],
        "kl_cut": 1 - one["kl_divergence"] / uniform,
        "exact_cpu_seconds": exact["cpu_seconds"],
        "kl_exact": exact["kl_divergence"],
        "exact_kl_cut": 1 - exact["kl_divergence"] / uniform,
        "random_search_cpu_seconds": random["cpu_seconds"],
        "kl_random_search": random["kl_divergence"],
        "random_search_kl_cut": 1 - random["kl_divergence"] / uniform,
        "candidates_per_second": one["candidates_per_second"],
        "two_evaluators": two["candidates_per_second"] / one["candidates_per_second"],
        "swap_share": one["search_swap_seconds"] / one["search_seconds"],
        "same_result": one["kl_divergence"] == two["kl_divergence"],
        "cpu_seconds": one["cpu_seconds"] + two["cpu_seconds"] + made["cpu_seconds"],
        "peak_rss_bytes": max(one["peak_rss_bytes"], two["peak_rss_bytes"], made["peak_rss_bytes"]),
    }


def _section(config: Config, measured: Measured) -> str:
    """The document's section, without its heading."""
    metrics, head, rows = measured["metrics"], ["budget"], []
    for grouping in config.groupings:
        head += [f"{row['allocator']}, {grouping}" for row in measured["tables"][grouping] if _first(row, config)]
    for budget in config.budgets:
        cells = [
            f"{row['kl_divergence']:.5f} ({row['bits_per_weight']:.3f})"
            for grouping in config.groupings
            for row in measured["tables"][grouping]
            if row["budget"] == budget
        ]
        rows.append([f"{budget:g}", *cells])
    figures = [
        ["CPU s of `hasten levels` at 2, 3, 4, 5, 6 and 8 bits over one GPTQ run", f"{metrics['levels_ratio']:.2f}"],
        ["bytes per weight of the database for 2 to 6 bits", f"{metrics['bytes_per_weight']:.3f}"],
        ["CPU s of the published search (the peer: 117)", f"{metrics['search_cpu_seconds']:.1f}"],
        ["KL of uniform GPTQ, of the search", f"{metrics['kl_uniform']:.5f}, {metrics['kl_search']:.5f}"],
        ["KL cut by it (the peer: 30 %)", f"{metrics['kl_cut']:.1%}"],
        ["CPU s of the exact optimum by errors=kl_scaled on 512 tokens", f"{metrics['exact_cpu_seconds']:.1f}"],
        ["KL cut by that", f"{metrics['exact_kl_cut']:.1%}"],
        ["CPU s of random search of as many measured tokens", f"{metrics['random_search_cpu_seconds']:.1f}"],
        [
            "KL of random search, its cut",
            f"{metrics['kl_random_search']:.5f}, {metrics['random_search_kl_cut']:.1%}",
        ],
        ["candidates a second, two evaluators over one", f"{metrics['two_evaluators']:.2f}"],
        ["share of an evaluation that swapping takes", f"{metrics['swap_share']:.1%}"],
    ]
    if "peer_kl" in metrics:
        ours, theirs = metrics["search_cpu_seconds"], metrics["peer_search_cpu_seconds"]
        figures += [
            ["CPU s of the peer's search here, ours over it", f"{theirs:.1f}, {ours / theirs:.2f}"],
            ["KL of what the peer found, its cut", f"{metrics['peer_kl']:.5f}, {_cut(metrics):.1%}"],
            ["bytes per weight of the peer's database", f"{metrics['peer_bytes_per_weight']:.1f}"],
        ]
    text = [
        f"{config.model}, groups of 128, symmetric; {config.calibration_sequences}×512 calibration tokens, "
        f"{config.windows} held-out windows of 512; EvoPress of {config.generations} generations of 16, steps "
        f"on {', '.join(map(str, config.tokens))} of {512 * config.search_sequences} tokens.",
        "KL(original || compressed) in nats per token, in brackets the bits per weight that were spent, with scales. "
        "With a budget between two levels uniform takes the lower. BAQ and the exact optimum go by each "
        "layer's part of the divergence of a mixture (errors=gradient), and EvoPress starts from the latter. So does "
        "random search, which makes the same moves and measures as many tokens.",
        provenance(),
        table(head, rows),
        "The published search: 10 generations of 12 offspring, survivors 4, 2, 1 on 512, 1024, 4096 tokens, KL, levels "
        "2 to 6, start by output errors, 3.125 bits (3 and the scales), one evaluator, one thread. The peer's figures "
        "in brackets are of an early checkpoint of `../shared/models/target`"
        + (", the others of its code in this run, on the same levels and tokens." if "peer_kl" in metrics else "."),
        table(["measured", "value"], figures),
    ]
    return "\n\n".join(text)


def _cut(metrics: Mapping[str, float]) -> float:
    return 1 - metrics["peer_kl"] / metrics["kl_uniform"]


def _first(row: ParetoRow, config: Config) -> bool:
    return row["budget"] == config.budgets[0]
