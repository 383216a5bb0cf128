"""KV caches at equal bytes: hasten's methods against kvpress's presses and transformers' QuantizedCache.

All get the same token windows and recall samples, on one thread. kvpress and the backends of QuantizedCache run in
environments of their own, whose Pythons are kvpress_python and quantized_python; without them their rows are left out.
Rows that are in run_dir already are not measured again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import check_peer, peer_caches
from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, SOURCE, Run, option, plain

HEADING = "cache: KV caches at equal bytes"
_PRESSES = ("SnapKV", "StreamingLLM", "ObservedAttention", "ExpectedAttention", "TOVA", "KeyDiff", "Knorm")
# A row has as many bytes as another one if it has at most so many times as many.
_EQUAL = 1.02


@dataclass
class Config(Run):
    """Compare KV-cache methods of hasten with those of kvpress and transformers, on text and on recall."""

    model: str = option("embedded:recall", f"model whose caches are compressed: {MODEL}", path="in")
    method: list[str] = option(
        [
            *("snapkv", "h2o", "streaming_llm", "pyramid", "ems", "d2o", "chelsea", "kvquant", "kivi:bits=8"),
            *("kivi:bits=4", "kivi:bits=4,block=64", "kivi:bits=2", "kivi:bits=2,residual=0"),
        ],
        "hasten's methods, as `hasten cache` takes them",
    )
    budget: list[float] = option([0.5, 0.25], "share of the tokens that evictors keep, hasten's and presses")
    presses: list[str] = option(list(_PRESSES), "presses of kvpress, without `Press`")
    quantized: list[str] = option(
        ["quanto:4:0", "quanto:2:0", "quanto:2:-1", "hqq:4:0", "hqq:2:0", "hqq:2:1"],
        "transformers' QuantizedCache: backend, bits and the keys' axis",
    )
    tasks: list[str] = option(
        ["text", "needle", "keys", "joint", "repeated", "multi_turn"], "what is measured, as by `hasten cache`"
    )
    context: int = option(1920, "tokens of the prompt", at_least=8)
    new_tokens: int = option(64, "tokens of text that are predicted behind the prompt", at_least=1)
    sequences: int = option(4, "sequences of text", at_least=1)
    samples: int = option(8, "samples of each recall task", at_least=1)
    source: str = option("library", f"text, also between the needles: {SOURCE}", path="in")
    kvpress_python: str | None = option(None, "Python of an environment with kvpress 0.5 and transformers below 5.3")
    quantized_python: str | None = option(None, "Python of an environment with transformers, optimum-quanto and hqq")
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Row:
    """A cache. owner: whose it is. recall: by task. error: why there are no figures."""

    owner: str
    method: str
    kl_divergence: float | None = None
    bytes_end: int | None = None
    recall: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def mean_recall(self) -> float | None:
        """Mean over the tasks."""
        return sum(self.recall.values()) / len(self.recall) if self.recall else None


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench cache --help` must not wait for it.
    import torch

    from hasten.accel.cache.measure import measure
    from hasten.accel.cache.statistics import load
    from hasten.accel.models.checkpoint import resolve
    from hasten.cluster.programs.caches import load_reference
    from hasten.jobs.bench.measurements.caches import write_inputs
    from hasten.jobs.cache.rows import row_file, write_row
    from hasten.jobs.cache.run import cache_inputs, cache_rows

    if "text" not in config.tasks:
        raise UserError(f"tasks={config.tasks} must hold text, on which bytes are measured")
    names = ("model", "method", "budget", "tasks", "context", "new_tokens", "sequences", "samples", "source", "seed")
    own = CacheConfig(**{name: getattr(config, name) for name in names}, device="cpu")
    model = resolve(config.model).absolute()
    named = cache_rows(own, model)
    # On the CPU and in float32, as the peers run.
    inputs = replace(cache_inputs(own, model), dtype=torch.float32)
    presses = [f"press:{name}Press:{1 - share:g}" for name in config.presses for share in config.budget]
    peers = {
        "kvpress": (config.kvpress_python, "kvpress", presses),
        "transformers": (config.quantized_python, "optimum-quanto", config.quantized),
    }
    for python, package, _ in peers.values():
        if python is not None:
            check_peer(python, package)
    folder = start(config)
    with tracked(config, "bench cache", folder) as tracker:
        tracker.params(plain(config))
        file = write_inputs(inputs, folder / "inputs.json")
        rows: list[Row] = []
        versions: dict[str, dict[str, str]] = {}
        total = len(named) + sum(python is not None for python, _, _ in peers.values())
        with Progress("bench cache", total, "row") as bar:
            torch.set_num_threads(1)
            loaded, reference = load_reference(inputs)
            (folder / "rows").mkdir(exist_ok=True)
            for name, row in named:
                own_file = row_file(folder / "rows", inputs, row)
                if not own_file.exists():
                    statistics = None if row.statistics is None else load(row.method, row.statistics)
                    found = measure(loaded, row.method, row.budget, reference, inputs.recall, statistics=statistics)
                    write_row(own_file, found)
                found = json.loads(own_file.read_text())
                title = name if row.budget is None else f"{name} {row.budget.value:g}"
                rows.append(row_of("hasten", title, found))
                bar.update(len(rows), f"{name}: KL {rows[-1].kl_divergence:.4f}")
            done = len(rows)
            for owner, (python, _, methods) in peers.items():
                if python is None:
                    continue
                options = {"model": model, "inputs": file.resolve(), "methods": ",".join(["full", *methods])}
                answer = peer_caches(python, folder / owner, options)
                rows += [row_of(owner, name, found) for name, found in answer["rows"].items()]
                versions[owner] = answer["versions"]
                done += 1
                bar.update(done, owner)
        publish(config.document, folder, HEADING, _section(config, rows, versions))
        report = {
            "job": "bench cache",
            "config": plain(config),
            "metrics": metrics(rows),
            "rows": [asdict(row) for row in rows],
            "output": str(folder),
        }
        return tracker.report(report)


def row_of(owner: str, method: str, found: Mapping[str, Any]) -> Row:
    """Row of a measurement of hasten's or of the peers' script."""
    if "error" in found:
        return Row(owner, method, error=found["error"])
    recall = {key.removeprefix("recall_"): value for key, value in found.items() if key.startswith("recall_")}
    return Row(owner, method, found["kl_divergence"], found["bytes_end"], recall)


def rival(row: Row, rows: Sequence[Row]) -> Row | None:
    """hasten's row of the least divergence among those with no more bytes than a peer's; None where there is none."""
    fitting = [
        (other.kl_divergence, other)
        for other in rows
        if other.owner == "hasten" and other.bytes_end is not None and other.kl_divergence is not None
        if row.bytes_end is not None and other.bytes_end <= _EQUAL * row.bytes_end
    ]
    return min(fitting, key=lambda pair: pair[0])[1] if fitting else None


def metrics(rows: Sequence[Row]) -> dict[str, int]:
    """Peers' rows, and on how many of them hasten diverges less and recalls no less with at most the same bytes."""
    peers = [row for row in rows if row.owner != "hasten" and row.kl_divergence is not None and row.method != "full"]
    diverges_less, recalls_no_less = 0, 0
    for row in peers:
        own = rival(row, rows)
        if own is None or own.kl_divergence is None or row.kl_divergence is None:
            continue
        diverges_less += int(own.kl_divergence < row.kl_divergence)
        if own.mean_recall is not None and row.mean_recall is not None:
            recalls_no_less += int(own.mean_recall >= row.mean_recall)
    return {"peer_rows": len(peers), "less_divergence": diverges_less, "no_less_recall": recalls_no_less}


def _section(config: Config, rows: Sequence[Row], versions: Mapping[str, Mapping[str, str]]) -> str:
    """The document's section, without its heading."""
    peers = "; ".join(
        ", ".join(f"{package} {number}" for package, number in of_owner.items()) for of_owner in versions.values()
    )
    return "\n\n".join(
        [
            f"`{Path(config.model).name}`; {config.sequences} sequences of {config.context} tokens and "
            f"{config.new_tokens} behind them, {config.samples} samples of each recall task in contexts of as "
            "many tokens; float32, one thread. "
            f"Peers: {peers or 'not run'}.",
            "KL is KL(full cache || cache) in nats per token. MiB: of all tensors that the cache holds behind the last "
            "token of the text, room for tokens to come included. Recall: share of the answers' tokens, questions "
            "behind the compressed context. The last columns: hasten's row of the least KL with at most the same "
            "bytes, its KL over the peer's, and its mean recall less the peer's, in points.",
            provenance(),
            table(_heads(rows), [_cells(row, rows) for row in sorted(rows, key=lambda row: -(row.bytes_end or 0))]),
        ]
    )


def _heads(rows: Sequence[Row]) -> list[str]:
    tasks = next((row.recall for row in rows if row.recall), {})
    return ["", "cache", "KL", "MiB", *(task.replace("_", " ") for task in tasks), "hasten's", "KL", "recall"]


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    tasks = next((row.recall for row in rows if row.recall), {})
    if row.kl_divergence is None or row.bytes_end is None:
        return [row.owner, row.method, "failed", *["–"] * (len(tasks) + 4)]
    cells = [row.owner, row.method, f"{row.kl_divergence:.4f}", f"{row.bytes_end / 2**20:.3f}"]
    cells += [f"{row.recall[task]:.0%}" for task in tasks]
    own = None if row.owner == "hasten" or row.method == "full" else rival(row, rows)
    if own is None or own.kl_divergence is None:
        return [*cells, "–", "–", "–"]
    gained = "–"
    if own.mean_recall is not None and row.mean_recall is not None:
        gained = f"{100 * (own.mean_recall - row.mean_recall):+.0f}"
    ratio = f"{own.kl_divergence / row.kl_divergence:.2f}" if row.kl_divergence > 0 else "–"
    return [*cells, own.method, ratio, gained]
