"""Options of `hasten search`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import GATE, SOURCE, Evaluation, group, option, section
from hasten.jobs.levels.options import LevelOptions


@dataclass
class SearchTokens:
    """Tokens that candidates are compared on."""

    source: str | None = option(
        None,
        f"text that candidates are compared on: {SOURCE}; null is a part of the calibration's text that nothing else "
        "reads",
        path="in",
    )
    sequences: int = option(32, "sequences that the samples are drawn from", at_least=1)
    sequence_length: int = option(512, "tokens in a sequence, with those that begin it", at_least=2)
    error_sequences: int = option(
        12, "how many of the sequences the errors are measured on; with errors=gradient in each pass", at_least=1
    )
    error_passes: int = option(
        3, "measurements of errors=gradient: of a first mixture, then of the best one by the errors so far", at_least=1
    )
    seed: int = option(1, "seed for drawing sequences from the source", at_least=0)
    batch: int = option(1, "sequences that run through a block at once; more are faster on a GPU", at_least=1)


@dataclass
class Latency:
    """The pass whose time a budget of milliseconds limits."""

    tokens: int = option(1, "tokens of a pass, such as the sequences that are decoded at a time", at_least=1)
    other: float = option(0.0, "milliseconds of a pass that levels do not change, which are added", at_least=0)


@dataclass
class SearchConfig(LevelOptions):
    """Spread a budget of bits over the layers: build the levels, choose among them, write the checkpoint; resumable."""

    budget: list[float] = option(
        [3.2],
        "average bits per quantized weight, scales included, or what budget_unit says; a list adds a table that "
        "compares allocators",
    )
    budget_unit: str = option(
        "bits",
        "what the budget counts: bits of a weight; gigabytes (10^9 bytes) of the checkpoint; or predicted milliseconds "
        "of the layers' products in a pass of latency.tokens on a GPU, see hardware",
        choices=("bits", "gigabytes", "milliseconds"),
    )
    hardware: dict[str, Any] = group("GPU whose rates predict milliseconds, for budget_unit=milliseconds")
    latency: Latency = section(Latency)
    allocator: dict[str, Any] = group("method that gives each layer a level within the budget")
    grouping: str = option(
        "serving",
        "layers that share a level: with serving those that servers fuse (q/k/v, gate/up, experts)",
        choices=("none", "serving"),
    )
    keep: bool = option(False, "layers may also stay uncompressed, at the bits of the checkpoint")
    drop: list[str] = option([], "parts of a block that may be dropped: attention, mlp, block")
    errors: str = option(
        "gradient",
        "errors whose sum allocators minimize: each layer's part of the KL divergence of a mixture of the budget's "
        "size, from a backward pass; output error of each layer; KL divergence of each level alone; that of one level "
        "per layer alone, scaled to the other levels by the output errors; or the squared change of a layer's outputs "
        "times the squared gradient of the loss (AutoQuantize of Model Optimizer)",
        choices=("gradient", "output", "kl", "kl_scaled", "autoquantize"),
    )
    fitness: dict[str, Any] = group("loss by which a search compares candidates")
    compare: list[str] = option(
        [], "allocators in the table for a list of budgets, with default hyper-parameters; [] is all of them"
    )
    levels: str | None = option(
        None,
        "folder of a finished level database, whose levels are used; null builds one in runs/levels/NAME",
        path="in",
    )
    output: str | None = option(None, "folder of the checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "discard the output of an earlier run and start again")
    search: SearchTokens = section(SearchTokens)
    gate: list[str] = option([], GATE)
    evaluation: Evaluation = section(Evaluation)
