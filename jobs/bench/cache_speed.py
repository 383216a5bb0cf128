"""CPU time of a decoded token behind a long context, by what the KV cache keeps and by batch.

Contexts are random keys and values: what a pass costs does not depend on them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time
from typing import TYPE_CHECKING

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.cli.methods import CONF
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, Run, option, plain

if TYPE_CHECKING:
    from hasten.accel.decoding.targets.fast import FastTarget

HEADING = "cache speed: decoding with compressed KV caches"
_DENSE = "dense"
_SEED = 0


@dataclass
class Config(Run):
    """Decode greedily on one thread in float32 on the fast path; rows of a batch take their steps in turn."""

    target: str = option("embedded:target", f"the target, of Llama's kind: {MODEL}")
    context: int = option(512, "tokens of the context", at_least=1)
    batches: list[int] = option([1, 8], "sequences that are decoded at once")
    caches: list[str] = option(
        ["full", "kivi bits=4", "kivi bits=2", "snapkv cache_budget=0.5"],
        "caches and their options beside the dense cache of decoding without one, as NAME or NAME OPTION=VALUE ...",
    )
    tokens: int = option(
        32,
        "tokens of a sequence in a round at least: a round is as long as the longest time between two compressions",
        at_least=1,
    )
    rounds: int = option(3, "rounds, of whose times the least counts for each token", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Row:
    """seconds: CPU time of each step of a round, the least of all rounds. cache_bytes: at the end."""

    seconds: Sequence[float]
    cache_bytes: int

    @property
    def token_seconds(self) -> float:
        """Mean of a round."""
        return sum(self.seconds) / len(self.seconds)


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench cache_speed --help` must not wait for it.
    import torch

    from hasten.accel.models.checkpoint import resolve

    model = resolve(config.target).absolute()
    folder = start(config)
    with tracked(config, "bench cache_speed", folder) as tracker:
        tracker.params(plain(config))
        torch.set_num_threads(1)
        targets = _targets(config, model)
        results: dict[int, dict[str, Row]] = {}
        with Progress("bench cache_speed", len(config.batches), "batch") as progress:
            for number, batch in enumerate(config.batches):
                results[batch] = _rows(targets, batch, config)
                progress.update(number + 1, f"batch {batch}")
        publish(config.document, folder, HEADING, _section(config, results))
        report = {
            "job": "bench cache_speed",
            "config": plain(config),
            "metrics": _metrics(results),
            "rows": {str(batch): {name: asdict(row) for name, row in rows.items()} for batch, rows in results.items()},
            "output": str(folder),
        }
        return tracker.report(report)


def _targets(config: Config, model: Path) -> "dict[str, FastTarget]":
    """The target with a dense cache, and with each other one; all share their weights."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    from hasten.accel.cache.base import CacheBudget
    from hasten.accel.decoding.targets.cached import CachedFastTarget
    from hasten.accel.decoding.targets.fast import FastTarget
    from hasten.accel.decoding.targets.loading import load_target, shape_of

    dense = load_target(model, torch.float32, path="fast")
    assert isinstance(dense, FastTarget)
    targets = {_DENSE: dense}
    for words in config.caches:
        name, *choices = words.split()
        if not (CONF / "cache" / f"{name}.yaml").is_file() or not all("=" in choice for choice in choices):
            raise UserError(f"caches={words} is wrong: expected NAME OPTION=VALUE ..., such as kivi bits=4")
        values = OmegaConf.from_dotlist(choices)
        budget = values.pop("cache_budget", None)
        method = instantiate(OmegaConf.merge(OmegaConf.load(CONF / "cache" / f"{name}.yaml"), values))
        shape = shape_of(AutoConfig.from_pretrained(model), dense.dtype, dense.device)
        targets[words] = CachedFastTarget(dense.decoder, shape, method, None if budget is None else CacheBudget(budget))
    return targets


def _rows(targets: "Mapping[str, FastTarget]", batch: int, config: Config) -> dict[str, Row]:
    """A row of every target, which take their steps in turn."""
    import torch

    tokens = _round(targets, config)
    for target in targets.values():
        target.reserve(batch, config.context + config.rounds * tokens + 2)
        generator = torch.Generator().manual_seed(_SEED)
        for slot in range(batch):
            # Of different lengths, as sequences of a batch are.
            target.fill(slot, config.context - slot, generator)
            target.end_prompt(slot)
        _step(target, batch)
    seconds = {name: [math.inf] * tokens for name in targets}
    for _ in range(config.rounds):
        for step in range(tokens):
            for name, target in targets.items():
                # Other load on the machine only makes a step slower.
                seconds[name][step] = min(seconds[name][step], _step(target, batch))
    rows = {name: Row(seconds[name], target.cache_bytes) for name, target in targets.items()}
    for target in targets.values():
        target.reserve(1, 1)  # returns the memory
    return rows


def _round(targets: "Mapping[str, FastTarget]", config: Config) -> int:
    """Steps of a round: with fewer, the least time of a step would be that of rounds without a compression."""
    from hasten.accel.decoding.targets.cached import CachedFastTarget

    intervals = [1]
    for target in targets.values():
        if isinstance(target, CachedFastTarget):
            budget = None if target.budget is None else target.budget.tokens(config.context)
            intervals.append(target.method.interval_of(budget))
    longest = max(intervals)
    return longest * -(-config.tokens // longest)


def _step(target: "FastTarget", batch: int) -> float:
    """CPU seconds of a token of each sequence."""
    from hasten.accel.decoding.tree import ROOT

    started = thread_time()
    target.forward(range(batch), [[1]] * batch, [[ROOT]] * batch).logits.argmax(-1)
    for slot in range(batch):
        target.commit(slot, [0])
    return thread_time() - started


def _metrics(results: Mapping[int, Mapping[str, Row]]) -> dict[str, float]:
    """Speed over the dense cache, and the share of its bytes, by batch and cache."""
    metrics: dict[str, float] = {}
    for batch, rows in results.items():
        dense = rows[_DENSE]
        for name, row in rows.items():
            key = f"batch_{batch}_{name.replace(' ', '_').replace('=', '_')}"
            metrics[f"{key}_speed"] = dense.token_seconds / row.token_seconds
            metrics[f"{key}_bytes_share"] = row.cache_bytes / dense.cache_bytes
    return metrics


def _section(config: Config, results: Mapping[int, Mapping[str, Row]]) -> str:
    lines = [
        [
            str(batch),
            f"`{name}`",
            f"{1e3 * row.token_seconds:.1f}",
            f"{rows[_DENSE].token_seconds / row.token_seconds:.2f}",
            f"{row.cache_bytes / 1e6:.0f}",
        ]
        for batch, rows in results.items()
        for name, row in rows.items()
    ]
    steps = max((len(row.seconds) for rows in results.values() for row in rows.values()), default=0)
    text = [
        f"`hasten bench cache_speed target={Path(config.target).name} context={config.context}`: one step of all "
        "sequences of a batch on the fast path, float32, one thread, CPU time; the rows of a batch take their "
        f"{steps} steps in turn, compressions included, and the least of {config.rounds} rounds counts for "
        "each step. `dense` is decoding without a cache method. Contexts are random keys and values.",
        provenance(),
        table(["batch", "cache", "ms a step", "over dense", "MB of caches"], lines),
    ]
    return "\n\n".join(text)
