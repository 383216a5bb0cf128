"""Training of draft heads against transformers' Trainer with the same network, batches and loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.cli.methods import build, method_names, target_of
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, Run, option, plain

HEADING = "train: draft heads against transformers' Trainer"
_LOOPS = {"hasten": "hasten", "transformers": "transformers' Trainer"}


@dataclass
class Config(Run):
    """Train each head for some steps in both loops, in turns, on records of library text; CPU time counts."""

    target: str = option("embedded:target", f"target: {MODEL}")
    heads: list[str] = option(["medusa", "hydra", "clover", "eagle"], "heads of hasten train")
    steps: int = option(4, "steps that are timed in each turn", at_least=1)
    turns: int = option(3, "turns of both loops", at_least=1)
    batch: int = option(4, "windows of a step", at_least=1)
    window: int = option(256, "tokens of a window", at_least=16)
    draft_vocabulary: int = option(1024, "ids that the heads draft; 0 is all", at_least=0)
    threads: int = option(1, "threads", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    if find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate, which is not installed: pip install accelerate")
    # torch and transformers: `hasten bench train --help` must not wait for them.
    import torch

    from hasten.accel.training.heads.draft_head import DraftHead
    from hasten.jobs.bench.measurements.head_training import Loops, matrix_rate

    known = method_names("head")
    for name in config.heads:
        if name not in known:
            raise UserError(f"heads={name} is wrong: expected heads of {', '.join(known)}")
    heads = {name: build({"_target_": target_of("head", name)}) for name in config.heads}
    for name, head in heads.items():
        if not isinstance(head, DraftHead):
            raise UserError(f"heads={name} drafts nothing: expected heads of hasten train")
    torch.set_num_threads(config.threads)
    folder = start(config)
    with tracked(config, "bench train", folder) as tracker:
        tracker.params(plain(config))
        loops = Loops(
            heads.values(),
            config.target,
            config.window,
            config.batch,
            config.steps,
            config.turns,
            config.seed,
            folder,
        )
        rate = matrix_rate()
        results = {name: loops.measure(head, config.draft_vocabulary) for name, head in heads.items()}
        publish(config.document, folder, HEADING, _section(config, results, rate))
        report = {
            "job": "bench train",
            "config": plain(config),
            "metrics": {f"{name}_over_transformers": _ratio(result) for name, result in results.items()},
            "matrix_rate": rate,
            "training": results,
            "output": str(folder),
        }
        return tracker.report(report)


def _ratio(result: Mapping[str, Any]) -> float:
    """Speed of our loop over that of transformers' Trainer."""
    seconds = result["seconds"]
    return float(seconds["transformers"] / seconds["hasten"])


def _section(config: Config, results: Mapping[str, Mapping[str, Any]], rate: float) -> str:
    tokens = config.batch * config.window
    rows = []
    for name, result in results.items():
        for loop, label in _LOOPS.items():
            seconds = result["seconds"][loop]
            rows.append(
                [
                    f"{name}, {result['parameters'] / 1e6:.2f} M",
                    label,
                    f"{seconds:.3f}",
                    f"{tokens / seconds:.0f}",
                    f"{result['flops'] / seconds / rate:.0%}",
                    f"{_ratio(result):.2f}" if loop == "hasten" else "",
                ]
            )
    text = [
        f"`hasten bench train target={config.target}`: CPU seconds of a step of {config.batch} windows of "
        f"{config.window} tokens with their batch, the median of {config.steps * config.turns} in turns, float32, "
        f"threads={config.threads}. Both loops begin with the same weights, take the same batches, clip, and use "
        "torch's fused AdamW; their first losses were equal. The rate of matrix products is that of torch.mm of 1024 "
        f"by 1024 in the same process, {rate / 1e9:.0f} GFLOP/s; a step's FLOPs are counted by torch.",
        provenance(),
        table(["head", "loop", "CPU s", "tokens/s", "of the matrix rate", "speed over Trainer"], rows),
    ]
    return "\n\n".join(text)
