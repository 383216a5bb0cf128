"""`hasten search`: finds the best mixture of levels within a budget of bits and writes the checkpoint."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

from hasten.accel.evaluation.gates import Gate
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.arithmetic import resolve_device
from hasten.jobs.common.cluster import cluster_session
from hasten.jobs.common.gates import check_gates, compared_tasks, judge, print_gates
from hasten.jobs.common.gguf import print_gguf
from hasten.jobs.common.loading import loader_of, print_loader
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import level_map, pareto
from hasten.jobs.common.quality import FIGURES, print_warnings, quality_warnings
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import FORMATS, plain
from hasten.jobs.common.texts import print_texts
from hasten.jobs.search.allocation import Search, WrittenCheckpoint
from hasten.jobs.search.options import SearchConfig


def run(config: SearchConfig) -> Path:
    """Search, write the checkpoint of every budget, and compare; returns the path of report.json."""
    started = perf_counter()
    gates = check_gates(config.gate, config.evaluation.sequences)
    search = Search(config)
    with cluster_session(config, config.workers * config.threads, search.reads, search.writes):
        search.check()
        run_dir = start(config)
        with tracked(config, "search", run_dir) as tracker:
            tracker.params(plain(config))
            search.prepare(tracker)
            search.allocate(tracker)
            answers = [search.write(budget, tracker) for budget in config.budget]
            comparison = search.compare(tracker)
            usage = search.close()
            report = _report(config, answers, comparison, usage, perf_counter() - started)
            report |= search.texts.report(search.original)
            report["warnings"] = quality_warnings(report["metrics"], report["texts"])
            report["gates"] = _judged(gates, search.original, answers, resolve_device(config.device))
            _figures(report, run_dir, tracker)
            path = tracker.report(report)
    _print_summary(report)
    return path


def _report(
    config: SearchConfig,
    answers: list[WrittenCheckpoint],
    comparison: list[Record],
    usage: dict[str, float],
    seconds: float,
) -> Record:
    first = answers[0]
    return {
        "job": "search",
        "config": plain(config),
        "metrics": {**dict.fromkeys(FIGURES), **first.metrics, **usage, "seconds": seconds},
        "layers": [row | {"budget": answer.budget} for answer in answers for row in answer.layers],
        "budgets": [
            answer.metrics | {"output": str(answer.output), "loader": loader_of(answer.output)} for answer in answers
        ],
        "pareto": comparison,
        "output": str(first.output),
    }


def _judged(gates: Sequence[Gate], original: Path, answers: Sequence[WrittenCheckpoint], device: str) -> list[Record]:
    """Rows on the gates of the checkpoint of every budget."""
    rows: list[Record] = []
    compared = compared_tasks(gates, [answer.output for answer in answers], original, device)
    for answer, tasks in zip(answers, compared, strict=True):
        judged = judge(gates, {**answer.metrics, **tasks}, partial(list, answer.layers))
        rows += [row | {"budget": answer.budget} for row in judged]
    return rows


def _figures(report: Record, run_dir: Path, tracker: Tracker) -> None:
    for answer in report["budgets"]:
        rows = [row for row in report["layers"] if row["budget"] == answer["budget"]]
        tracker.figure(level_map(rows, run_dir / f"levels_{answer['budget']:g}.png"))
    if report["pareto"]:
        tracker.figure(pareto(report["pareto"], run_dir / "pareto.png"))


def _print_summary(report: Record) -> None:
    for answer in report["budgets"]:
        print(f"checkpoint: {as_given(answer['output'])}")
        quality = (
            "" if answer.get("kl_divergence") is None else f"; KL divergence {answer['kl_divergence']:.5f} nats a token"
        )
        print(
            f"size: {answer['bytes'] / 2**20:.1f} MiB, {answer['budget_bits_per_weight']:.4f} bits per weight{quality}"
        )
        print_loader(answer["loader"], Path(answer["output"]))
        if report["config"]["format"] == FORMATS[1]:
            print_gguf(answer["output"])
    if report["pareto"]:
        rows = [
            [
                row["allocator"],
                f"{row['budget']:g}",
                f"{row['bits_per_weight']:.4f}",
                "" if row["kl_divergence"] is None else f"{row['kl_divergence']:.5f}",
            ]
            for row in report["pareto"]
        ]
        print(table(["allocator", "budget", "bits per weight", "KL divergence"], rows))
    print_texts(report)
    print_warnings(report)
    print_gates(report)
