"""Peak memory of every process while a random Llama or mixture of experts is compressed, and again at double depth.

The checkpoints, about 1.1 and 2.1 billion parameters by default, are made in the run's folder and removed at the end.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import Outcome, hasten_compress
from hasten.jobs.bench.processes.watch import Peak
from hasten.jobs.cli.methods import method_names
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import GROUP_SIZE, Run, option, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOG = logging.getLogger(__name__)
HEADING = "memory: peak of every process"
_INTERVAL_SECONDS = 0.5
_EXPERTS_OF_A_TOKEN = 8


@dataclass
class Config(Run):
    """Measure memory at two depths; the sizes are those of the random checkpoint."""

    layers: int = option(16, "blocks of the first checkpoint; the second has twice as many", at_least=1)
    hidden_size: int = option(2048, "width", at_least=1)
    intermediate_size: int = option(8192, "width inside the feed-forward layers, or inside each expert", at_least=1)
    experts: int = option(0, "experts of a block, of which a token has at most 8; 0: a Llama", at_least=0)
    heads: int = option(32, "attention heads", at_least=1)
    kv_heads: int = option(8, "key-value heads", at_least=1)
    vocab_size: int = option(32000, "entries of the vocabulary", at_least=1)
    bits: int = option(4, "bits of a quantized weight", at_least=2, at_most=8)
    group_size: int | str = option("auto", GROUP_SIZE, at_least=1, words=("auto",))
    quantizer: str = option("gptq", "name of the quantizer, with its own defaults")
    sequences: int = option(16, "calibration sequences of random tokens", at_least=1)
    sequence_length: int = option(128, "tokens in a calibration sequence", at_least=2)
    workers: int = option(2, "calibrators, a process each", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    if config.quantizer not in method_names("quantizer"):
        raise UserError(f"quantizer={config.quantizer} is none of {', '.join(method_names('quantizer'))}")
    for name in ("hidden_size", "intermediate_size"):
        if config.group_size != "auto" and getattr(config, name) % config.group_size:
            raise UserError(f"group_size={config.group_size} must divide {name}={getattr(config, name)}")
    folder = start(config)
    tokens = _write_tokens(config, folder)
    with tracked(config, "bench memory", folder) as tracker:
        tracker.params(plain(config))
        outcomes = {depth: _compressed(config, folder, tokens, depth) for depth in (config.layers, 2 * config.layers)}
        publish(config.document, folder, _heading(config), _section(config, outcomes))
        report = {
            "job": "bench memory",
            "config": plain(config),
            "metrics": _metrics(outcomes),
            "runs": {str(depth): asdict(outcome) for depth, outcome in outcomes.items()},
            "output": str(folder),
        }
        return tracker.report(report)


def _heading(config: Config) -> str:
    return f"{HEADING}, mixture of experts" if config.experts else HEADING


def _write_tokens(config: Config, folder: Path) -> Path:
    """File of random calibration tokens."""
    # `hasten bench memory --help` must not wait for it.
    import numpy as np

    generator = np.random.default_rng(config.seed)
    path = folder / "calibration.npy"
    np.save(path, generator.integers(config.vocab_size, size=(config.sequences, config.sequence_length)))
    return path


def _compressed(config: Config, folder: Path, tokens: Path, depth: int) -> Outcome:
    """Outcome of compressing a checkpoint of that depth, which is removed afterwards."""
    # torch and transformers: `hasten bench memory --help` must not wait for them.
    from hasten.jobs.bench.measurements.random_checkpoint import write_random_checkpoint

    place = folder / f"{depth}-blocks"
    original = place / "original"
    options = {
        "model": original.resolve(),
        "quantizer": config.quantizer,
        "bits": config.bits,
        "group_size": config.group_size,
        "calibration.source": tokens.resolve(),
        "calibration.sequences": config.sequences,
        "calibration.sequence_length": config.sequence_length,
        "workers": config.workers,
        "threads": config.threads,
    }
    try:
        parameters = write_random_checkpoint(original, _model(config, depth), config.seed)
        _LOG.info("%d blocks, %.2f billion parameters", depth, parameters / 1e9)
        return hasten_compress(place, options, _INTERVAL_SECONDS)
    finally:
        shutil.rmtree(original, ignore_errors=True)
        shutil.rmtree(place / "model", ignore_errors=True)


def _model(config: Config, depth: int) -> "PretrainedConfig":
    from transformers import LlamaConfig, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "num_hidden_layers": depth,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
    }
    if not config.experts:
        return LlamaConfig(**sizes)
    of_experts: dict[str, Any] = {
        "head_dim": config.hidden_size // config.heads,
        "num_experts": config.experts,
        "num_experts_per_tok": min(config.experts, _EXPERTS_OF_A_TOKEN),
        "moe_intermediate_size": config.intermediate_size,
    }
    return Qwen3MoeConfig(**sizes, **of_experts)


def _block_bytes(config: Config) -> int:
    """Bytes of a block's matrices in bf16."""
    attention = 2 * config.hidden_size**2 * (1 + config.kv_heads / config.heads)
    inside = 3 * config.hidden_size * config.intermediate_size * max(1, config.experts)
    return int(2 * (attention + inside))


def _largest(outcome: Outcome) -> int:
    return max((peak.rss_bytes for peak in outcome.peaks.values()), default=0)


def _metrics(outcomes: Mapping[int, Outcome]) -> dict[str, float]:
    first, second = outcomes.values()
    return {
        "peak_rss_bytes": max(_largest(first), _largest(second)),
        "growth_at_double_depth": _largest(second) / _largest(first) - 1,
        "seconds": sum(outcome.whole_seconds for outcome in outcomes.values()),
        "cpu_seconds": sum(outcome.whole_cpu_seconds for outcome in outcomes.values()),
    }


def _section(config: Config, outcomes: Mapping[int, Outcome]) -> str:
    """The document's section, without its heading: a row for every kind of process, the largest first."""
    shallow, deep = (outcome.peaks for outcome in outcomes.values())
    order = sorted({*shallow, *deep}, key=lambda kind: -deep.get(kind, shallow.get(kind, Peak())).rss_bytes)
    head = ["process", "number"]
    for depth in outcomes:
        head += [f"{depth} blocks, MB", "unshared"]
    rows = []
    for kind in order:
        one, two = shallow.get(kind, Peak()), deep.get(kind, Peak())
        growth = f"{100 * (two.rss_bytes / one.rss_bytes - 1):+.1f} %" if one.rss_bytes and two.rss_bytes else "–"
        rows.append([kind, str(max(one.processes, two.processes)), *_cells(one), *_cells(two), growth])
    kind = f"mixture of {config.experts} experts" if config.experts else "Llama"
    text = [
        f"Random bf16 {kind} of width {config.hidden_size}, {config.intermediate_size} inside, vocabulary "
        f"{config.vocab_size}, {_block_bytes(config) / 1e6:.0f} MB a block; "
        f"{config.quantizer} W{config.bits}, groups of {config.group_size}, "
        f"{config.sequences}×{config.sequence_length} calibration tokens; workers={config.workers} "
        f"threads={config.threads}.",
        "Largest resident set of any process of its kind, polled twice a second; unshared excludes pages that several "
        "processes map, mostly Ray's object store. All processes from the command's start to its end.",
        provenance(),
        table([*head, "growth"], rows),
    ]
    return "\n\n".join(text)


def _cells(peak: Peak) -> list[str]:
    if not peak.processes:
        return ["–", "–"]
    return [f"{peak.rss_bytes / 1e6:.0f}", f"{peak.unshared_bytes / 1e6:.0f}"]
