"""GPTQ of hasten against round-to-nearest and llm-compressor's GPTQ: quality, cost and repeatability.

All use the same calibration windows and one thread, each in its own processes, and are measured by the same
evaluation. llm-compressor pins older versions of transformers and compressed-tensors and runs in its own environment,
whose Python is peer_python; without it the peer's rows read "not run".
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import Outcome, check_peer, hasten_compress, peer_compress
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import DTYPES, MODEL, SOURCE, Calibration, Run, option, plain, section

if TYPE_CHECKING:
    from hasten.jobs.bench.measurements.quality import Quality

_LOG = logging.getLogger(__name__)
HEADING = "compress: GPTQ against its peers"
GPTQ, NEAREST, PEER = "hasten GPTQ", "hasten round-to-nearest", "llm-compressor GPTQ"
_NOT_RUN = "not run"


@dataclass
class Config(Run):
    """Compare GPTQ with round-to-nearest and with llm-compressor."""

    model: str = option("embedded:target", f"what is compressed: {MODEL}")
    bits: list[int] = option([4, 3, 2], "bits of a quantized weight, one after the other")
    group_size: int | str = option(
        "auto",
        "input columns that share a scale; auto is the largest of 128, 64 and 32 that all layers allow",
        at_least=1,
        words=("auto",),
    )
    symmetric: bool = option(False, "no zero points")
    calibration: Calibration = section(Calibration)
    held_out: str | None = option(
        None, f"text that quality is measured on: {SOURCE}; null is another part of calibration.source"
    )
    windows: int = option(64, "held-out windows for perplexity", at_least=1)
    divergence_windows: int = option(32, "the first of them, for divergence from the original", at_least=1)
    repeat: int = option(2, "runs of hasten's GPTQ, whose bytes are compared", at_least=1)
    peer_python: str | None = option(None, "Python of an environment with llm-compressor; null leaves its rows out")
    peer_dtypes: list[str] = option(
        ["auto", "float32"], "dtypes that llm-compressor calibrates in; auto, its default, is the checkpoint's"
    )
    peer_repeat: int = option(1, "runs of llm-compressor", at_least=1)
    scaling: list[int] = option([1, 2], "numbers of calibrators whose time is compared; [] compares none")
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Row:
    """A method at some bits: all its runs, and the quality of the first one's output (None where it was not run)."""

    method: str
    bits: int
    runs: tuple[Outcome, ...] = ()
    perplexity: float | None = None
    kl_divergence: float | None = None

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the fastest run: other processes, which share the caches, can only add to it."""
        return min(run.cpu_seconds for run in self.runs)

    @property
    def summary(self) -> str:
        """Quality and cost in one line."""
        name = f"W{self.bits} {self.method}"
        return (
            f"{name}: KL {self.kl_divergence:.5f}, {self.cpu_seconds:.1f} CPU s" if self.runs else f"{name}: {_NOT_RUN}"
        )

    @property
    def same_bytes(self) -> bool | None:
        """Whether all runs wrote the same bytes; None where there was only one."""
        return len({run.digest for run in self.runs}) == 1 if len(self.runs) > 1 else None


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench compress --help` must not wait for it.
    from hasten.jobs.bench.measurements.quality import common_group_size, inputs, save_tokens

    _check(config)
    model, tokens, quality = inputs(
        config.model, config.calibration, config.held_out, config.windows, config.divergence_windows
    )
    if isinstance(config.group_size, str):
        # One size for all layers, because the peer has no other.
        config = replace(config, group_size=common_group_size(model))
    if config.peer_python is not None:
        check_peer(config.peer_python)
    folder = start(config)
    with tracked(config, "bench compress", folder) as tracker:
        tracker.params(plain(config))
        shared = _shared_options(config, model, save_tokens(tokens, folder / "calibration.npy"))
        rows = _rows(config, folder, shared, quality)
        scaling = _scaling(config, folder, shared)
        publish(config.document, folder, HEADING, _section(config, rows, scaling, quality))
        report = {
            "job": "bench compress",
            "config": plain(config),
            "metrics": _metrics(rows, scaling),
            "rows": [asdict(row) for row in rows],
            "scaling": {str(workers): asdict(run) for workers, run in scaling.items()},
            "output": str(folder),
        }
        return tracker.report(report)


def _check(config: Config) -> None:
    """Raise UserError for options that contradict each other, and for list items out of range."""
    for bits in config.bits:
        if not 2 <= bits <= 8:
            raise UserError(f"bits={config.bits} must be a list of numbers from 2 to 8")
    for dtype in config.peer_dtypes:
        if dtype not in DTYPES:
            raise UserError(f"peer_dtypes={config.peer_dtypes} must be a list of some of {', '.join(DTYPES)}")
    if any(workers < 1 for workers in config.scaling):
        raise UserError(f"scaling={config.scaling} must be a list of numbers of calibrators, 1 or more")
    if config.divergence_windows > config.windows:
        raise UserError(f"divergence_windows={config.divergence_windows} must be at most windows={config.windows}")


def _shared_options(config: Config, model: Path, tokens: Path) -> dict[str, object]:
    """Options of `hasten compress` that all runs share; tokens: the file of calibration windows, also the peer's."""
    return {
        "model": model.resolve(),
        "group_size": config.group_size,
        "symmetric": str(config.symmetric).lower(),
        **{f"calibration.{key}": value for key, value in asdict(config.calibration).items()},
        "calibration.source": tokens.resolve(),
        "threads": 1,
        "workers": 1,
    }


def _rows(config: Config, folder: Path, shared: Mapping[str, object], quality: "Quality") -> list[Row]:
    """A row for every number of bits and method, in the table's order."""
    peers = config.peer_dtypes
    rows: list[Row] = []
    with Progress("bench compress", len(config.bits) * (2 + len(peers)), "row") as progress:
        for bits in config.bits:
            methods: list[tuple[str, int, Callable[[Path], Outcome] | None]] = [
                (NEAREST, 1, _hasten(shared, bits, "round_to_nearest")),
                (GPTQ, config.repeat, _hasten(shared, bits, "gptq")),
                *((f"{PEER}, {dtype}", config.peer_repeat, _peer(config, shared, bits, dtype)) for dtype in peers),
            ]
            for method, repeat, compress in methods:
                place = folder / f"W{bits}" / method.replace(" ", "-").replace(",", "")
                rows.append(_row(method, bits, repeat, compress, place, quality))
                progress.update(len(rows), rows[-1].summary)
    return rows


def _hasten(shared: Mapping[str, object], bits: int, quantizer: str) -> Callable[[Path], Outcome]:
    return partial(hasten_compress, options={**shared, "bits": bits, "quantizer": quantizer})


def _peer(config: Config, shared: Mapping[str, object], bits: int, dtype: str) -> Callable[[Path], Outcome] | None:
    if config.peer_python is None:
        return None
    options = {
        "model": shared["model"],
        "tokens": shared["calibration.source"],
        "bits": bits,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "dtype": dtype,
    }
    return partial(peer_compress, config.peer_python, options=options)


def _row(
    method: str, bits: int, repeat: int, compress: Callable[[Path], Outcome] | None, place: Path, quality: "Quality"
) -> Row:
    if compress is None:
        return Row(method, bits)
    runs = tuple(compress(place / f"run{number}") for number in range(1, repeat + 1))
    metrics = quality.measure(runs[0].folder)
    return Row(method, bits, runs, metrics["perplexity"], metrics["kl_divergence"])


def _scaling(config: Config, folder: Path, shared: Mapping[str, object]) -> dict[int, Outcome]:
    """GPTQ at the first of the bits, by number of calibrators, one thread each."""
    outcomes = {}
    for workers in config.scaling:
        options = {**shared, "bits": config.bits[0], "quantizer": "gptq", "workers": workers}
        outcomes[workers] = hasten_compress(folder / "scaling" / str(workers), options)
        _LOG.info("%d calibrators: %.1f s", workers, outcomes[workers].seconds)
    return outcomes


def _metrics(rows: Iterable[Row], scaling: Mapping[int, Outcome]) -> dict[str, float | None]:
    """The report's metrics."""
    rows = list(rows)
    metrics: dict[str, float | None] = {}
    for row in rows:
        if row.method == GPTQ:
            metrics[f"kl_divergence_w{row.bits}"] = row.kl_divergence
            metrics[f"cpu_seconds_w{row.bits}"] = row.cpu_seconds
            metrics[f"same_bytes_w{row.bits}"] = row.same_bytes
            metrics[f"cpu_ratio_w{row.bits}"] = _ratio(row, rows)
            peers = [other.kl_divergence for other in _peers(row, rows) if other.kl_divergence]
            if peers and row.kl_divergence is not None:
                metrics[f"kl_ratio_w{row.bits}"] = row.kl_divergence / min(peers)
    first = next(iter(scaling.values()), None)
    for workers, outcome in scaling.items():
        metrics[f"calibration_seconds_{workers}_workers"] = outcome.seconds
        metrics[f"speedup_{workers}_workers"] = first.seconds / outcome.seconds if first else None
    metrics["seconds"] = sum(run.whole_seconds for row in rows for run in row.runs)
    return metrics


def _peers(row: Row, rows: Iterable[Row]) -> list[Row]:
    return [other for other in rows if other.bits == row.bits and other.method.startswith(PEER) and other.runs]


def _ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """CPU seconds of a row over those of the fastest peer at the same bits; None without a peer."""
    peers = [other.cpu_seconds for other in _peers(row, rows)]
    return row.cpu_seconds / min(peers) if peers and row.runs else None


def _section(config: Config, rows: list[Row], scaling: Mapping[int, Outcome], quality: "Quality") -> str:
    """The document's section, without its heading."""
    head = ["method", "KL", "perplexity", "CPU s", "ratio", "CPU s, whole", "peak MB", "MB saved", "same bytes"]
    calibration = config.calibration
    original = quality.measure(quality.original)
    peers = {run.version for row in rows if row.method.startswith(PEER) for run in row.runs}
    peer = f"llm-compressor {', '.join(sorted(peers))}" if peers else "llm-compressor was not run: no peer_python"
    text = [
        f"`{config.model}`, groups of {config.group_size}, {'symmetric' if config.symmetric else 'asymmetric'}; "
        f"{calibration.sequences}×{calibration.sequence_length} calibration tokens, the same for all, one thread; "
        f"{peer}.",
        "KL is KL(original || compressed) in nats per token on "
        f"{config.divergence_windows} held-out windows, perplexity is of {config.windows} (the original's: "
        f"{original['perplexity']:.3f}). CPU s: of the calibration pass, driver and actors together, least of the "
        "runs; ratio: to the quickest peer at the same bits; whole: of all processes from start to end, imports and "
        "Ray among them. Peak MB: of the largest process. MB saved: all that was written. llm-compressor's windows "
        "are not shuffled; its float32 output is saved in float32.",
        provenance(),
        table(head, [_cells(row, rows) for row in rows]),
    ]
    if scaling:
        text += ["Calibrators, one thread each, on the same work:", _scaling_table(config, scaling)]
    return "\n\n".join(text)


def _cells(row: Row, rows: Iterable[Row]) -> list[str]:
    name = f"W{row.bits} {row.method}"
    if not row.runs:
        return [name, _NOT_RUN, *["–"] * 7]
    first = row.runs[0]
    ratio = _ratio(row, rows)
    same = {True: f"yes, {len(row.runs)} runs", False: "no", None: "–"}[row.same_bytes]
    return [
        name,
        f"{row.kl_divergence:.5f}",
        f"{row.perplexity:.3f}",
        f"{row.cpu_seconds:.1f}",
        "–" if ratio is None else f"{ratio:.2f}",
        f"{min(run.whole_cpu_seconds for run in row.runs):.1f}",
        f"{first.peak_rss_bytes / 1e6:.0f}",
        f"{first.bytes / 1e6:.2f}",
        same,
    ]


def _scaling_table(config: Config, scaling: Mapping[int, Outcome]) -> str:
    first = next(iter(scaling.values()))
    rows = [
        [
            f"W{config.bits[0]}, {workers} calibrator{'s' if workers > 1 else ''}",
            f"{outcome.seconds:.1f}",
            f"{first.seconds / outcome.seconds:.2f}",
            f"{outcome.cpu_seconds:.1f}",
            "yes" if outcome.digest == first.digest else "no",
        ]
        for workers, outcome in scaling.items()
    ]
    return table(["", "calibration s", "speed-up", "CPU s", "same bytes"], rows)
