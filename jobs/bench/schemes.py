"""Schemes that are deployed (AWQ, W8A8, FP8, MXFP4, NVFP4): hasten against llm-compressor's recipes.

Both use the same calibration windows and one thread, each in its own processes. The written checkpoints are measured by
the same evaluation, which rounds the inputs of layers as a server does. llm-compressor runs in its own environment,
whose Python is peer_python; without it the peer's rows read "not run".
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
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

HEADING = "schemes: what is deployed, against llm-compressor"
PEER = "llm-compressor"
_NOT_RUN = "not run"
# For each scheme the options of `hasten compress` by the name of a row: first the method of the peer's recipe.
RECIPES: dict[str, dict[str, dict[str, object]]] = {
    "w4a16": {
        "AWQ": {"quantizer": "round_to_nearest", "quantizer.search": 24, "transforms": "[awq]"},
        "GPTQ": {"quantizer": "gptq"},
        "AWQ, GPTQ": {"quantizer": "gptq", "transforms": "[awq]"},
    },
    "w8a8": {
        "SmoothQuant, GPTQ": {"quantizer": "gptq", "transforms": "[smoothquant]"},
        "GPTQ": {"quantizer": "gptq"},
    },
    "fp8": {"round to nearest": {"quantizer": "round_to_nearest"}, "GPTQ": {"quantizer": "gptq"}},
    "mxfp4": {"round to nearest": {"quantizer": "round_to_nearest"}, "GPTQ": {"quantizer": "gptq"}},
    "nvfp4": {"round to nearest": {"quantizer": "round_to_nearest"}, "GPTQ": {"quantizer": "gptq"}},
}


@dataclass
class Config(Run):
    """Compare schemes of hasten with llm-compressor's recipes for them."""

    model: str = option("embedded:target", f"what is compressed: {MODEL}")
    schemes: list[str] = option(list(RECIPES), f"which schemes: {', '.join(RECIPES)}")
    group_size: int = option(64, "input columns that share a scale in w4a16, in both", at_least=1)
    calibration: Calibration = section(Calibration)
    held_out: str | None = option(
        None, f"text that quality is measured on: {SOURCE}; null is another part of calibration.source"
    )
    windows: int = option(32, "held-out windows, for divergence from the original and perplexity", at_least=1)
    peer_python: str | None = option(None, "Python of an environment with llm-compressor; null leaves its rows out")
    peer_dtype: str = option("auto", "dtype that llm-compressor calibrates in", choices=DTYPES)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Row:
    """A method at a scheme; its run and quality are None where it was not run."""

    scheme: str
    method: str
    outcome: Outcome | None = None
    kl_divergence: float | None = None
    perplexity: float | None = None


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench schemes --help` must not wait for it.
    from hasten.jobs.bench.measurements.quality import inputs, save_tokens

    unknown = next((name for name in config.schemes if name not in RECIPES), None)
    if unknown is not None:
        raise UserError(f"schemes={unknown} is none of {', '.join(RECIPES)}")
    model, tokens, quality = inputs(config.model, config.calibration, config.held_out, config.windows, config.windows)
    if config.peer_python is not None:
        check_peer(config.peer_python)
    folder = start(config)
    with tracked(config, "bench schemes", folder) as tracker:
        tracker.params(plain(config))
        file = save_tokens(tokens, folder / "calibration.npy")
        rows = _rows(config, folder, model.resolve(), file.resolve(), quality)
        publish(config.document, folder, HEADING, _section(config, rows, quality))
        report = {
            "job": "bench schemes",
            "config": plain(config),
            "metrics": metrics(rows),
            "rows": [asdict(row) for row in rows],
            "output": str(folder),
        }
        return tracker.report(report)


def _rows(config: Config, folder: Path, model: Path, tokens: Path, quality: "Quality") -> list[Row]:
    """The peer and hasten's methods at every scheme, in the table's order."""
    shared: dict[str, object] = {
        "model": model,
        **{f"calibration.{key}": value for key, value in asdict(config.calibration).items()},
        "calibration.source": tokens,
        "threads": 1,
        "workers": 1,
    }
    rows: list[Row] = []
    with Progress("bench schemes", sum(1 + len(RECIPES[scheme]) for scheme in config.schemes), "row") as progress:
        for scheme in config.schemes:
            of_scheme: dict[str, object] = {"scheme": scheme}
            if scheme == "w4a16":
                # By bits, because the scheme says the group size, too.
                of_scheme = {"bits": 4, "group_size": config.group_size, "symmetric": "true"}
            rows.append(_peer_row(config, folder / scheme / "peer", scheme, model, tokens, quality))
            progress.update(len(rows), f"{scheme} {PEER}")
            for number, (method, options) in enumerate(RECIPES[scheme].items()):
                outcome = hasten_compress(folder / scheme / str(number), {**shared, **of_scheme, **options})
                rows.append(_measured(scheme, f"hasten {method}", outcome, quality))
                progress.update(len(rows), f"{scheme} {method}: KL {rows[-1].kl_divergence:.5f}")
    return rows


def _peer_row(config: Config, folder: Path, scheme: str, model: Path, tokens: Path, quality: "Quality") -> Row:
    name = f"{PEER} {next(iter(RECIPES[scheme]))}"
    if config.peer_python is None:
        return Row(scheme, name)
    options = {
        "model": model,
        "tokens": tokens,
        "recipe": scheme,
        "group_size": config.group_size,
        "symmetric": True,
        "dtype": config.peer_dtype,
    }
    return _measured(scheme, name, peer_compress(config.peer_python, folder, options), quality)


def _measured(scheme: str, method: str, outcome: Outcome, quality: "Quality") -> Row:
    measured = quality.measure(outcome.folder)
    return Row(scheme, method, outcome, measured["kl_divergence"], measured["perplexity"])


def metrics(rows: Iterable[Row]) -> dict[str, float | None]:
    """For each scheme, KL and CPU seconds of the peer's method and least KL of all, over those of the peer.

    CPU seconds are with reading and writing, which the peer does in one process with the rest.
    """
    found: dict[str, float | None] = {}
    by_scheme: dict[str, list[Row]] = {}
    for row in rows:
        by_scheme.setdefault(row.scheme, []).append(row)
    for scheme, (peer, same, *others) in by_scheme.items():
        least = min((row.kl_divergence for row in (same, *others) if row.kl_divergence is not None), default=None)
        found[f"kl_divergence_{scheme}"] = least
        if (
            peer.kl_divergence
            and peer.outcome
            and same.outcome
            and same.kl_divergence is not None
            and least is not None
        ):
            found[f"kl_ratio_{scheme}"] = same.kl_divergence / peer.kl_divergence
            found[f"best_kl_ratio_{scheme}"] = least / peer.kl_divergence
            found[f"cpu_ratio_{scheme}"] = _with_files(same.outcome) / _with_files(peer.outcome)
    return found


def _with_files(outcome: Outcome) -> float:
    return outcome.cpu_seconds + outcome.files_cpu_seconds


def _section(config: Config, rows: list[Row], quality: "Quality") -> str:
    """The document's section, without its heading."""
    calibration = config.calibration
    original = quality.measure(quality.original)
    versions = {row.outcome.version for row in rows if row.method.startswith(PEER) and row.outcome is not None}
    peer = f"{PEER} {', '.join(sorted(versions))}" if versions else f"{PEER} was not run: no peer_python"
    return "\n\n".join(
        [
            f"`{config.model}`; {calibration.sequences}×{calibration.sequence_length} calibration tokens, the same for "
            f"both, one thread; w4a16 in symmetric groups of {config.group_size}; {peer}.",
            f"KL is KL(original || compressed) in nats per token on {config.windows} held-out windows, with the inputs "
            f"of layers rounded as the checkpoint's config says; the original's perplexity is "
            f"{original['perplexity']:.3f}. CPU s: of reading, calibrating, compressing and writing, in all processes, "
            "without imports. MB: of all files.",
            provenance(),
            table(["scheme", "method", "KL", "of the peer", "perplexity", "CPU s", "of the peer", "MB"], _cells(rows)),
        ]
    )


def _cells(rows: Iterable[Row]) -> list[list[str]]:
    cells, peers = [], dict[str, Row]()
    for row in rows:
        peer = peers.setdefault(row.scheme, row)
        if row.outcome is None or row.kl_divergence is None:
            cells.append([row.scheme, row.method, _NOT_RUN, *["–"] * 5])
            continue
        ratios = ["–", "–"]
        if peer is not row and peer.outcome is not None and peer.kl_divergence:
            pairs = [(row.kl_divergence, peer.kl_divergence), (_with_files(row.outcome), _with_files(peer.outcome))]
            ratios = [f"{mine / other:.2f}" for mine, other in pairs]
        kl, perplexity, seconds = f"{row.kl_divergence:.5f}", f"{row.perplexity:.3f}", f"{_with_files(row.outcome):.1f}"
        megabytes = f"{row.outcome.bytes / 1e6:.2f}"
        cells.append([row.scheme, row.method, kl, ratios[0], perplexity, seconds, ratios[1], megabytes])
    return cells
