"""Options of `hasten search`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import SOURCE, Evaluation, group, option, section
from hasten.jobs.levels.options import LevelOptions


@dataclass
class SearchTokens:
    """Tokens that candidates are compared on."""

    source: str = option("library", f"text that candidates are compared on: {SOURCE}", path="in")
    sequences: int = option(64, "sequences that the samples are drawn from", at_least=1)
    sequence_length: int = option(512, "tokens in a sequence", at_least=2)
    error_sequences: int = option(
        8, "of the sequences, those on which errors=kl and kl_scaled measure layers alone", at_least=1
    )
    seed: int = option(1, "which sequences of the source are drawn", at_least=0)
    batch: int = option(1, "sequences that run through a block at once; more pay on a GPU", at_least=1)


@dataclass
class SearchConfig(LevelOptions):
    """Spend a budget of bits over the layers: make the levels, choose among them, write the checkpoint; resumable."""

    budget: list[float] = option(
        [3.2], "average bits of a quantized weight, scales counted; a list gives a table of all allocators"
    )
    allocator: dict[str, Any] = group("how the budget is spread")
    grouping: str = option(
        "serving",
        "which layers get the same level: with serving those that servers fuse (q/k/v, gate/up, experts)",
        choices=("none", "serving"),
    )
    keep: bool = option(False, "layers may also stay as they are, at the bits of the checkpoint")
    drop: list[str] = option([], "parts of a block that may be left out: attention, mlp, block")
    errors: str = option(
        "kl_scaled",
        "what allocators that add up errors go by: each layer's output error; the KL divergence of every level alone, "
        "or that of one level of each layer, carried to the others by the output errors",
        choices=("output", "kl", "kl_scaled"),
    )
    fitness: dict[str, Any] = group("what a search compares candidates by")
    compare: list[str] = option(
        [], "allocators in the table that a list of budgets gives, with their own defaults; [] is all that there are"
    )
    levels: str | None = option(
        None,
        "folder of a finished level database, whose levels count; null makes the one in runs/levels/NAME",
        path="in",
    )
    output: str | None = option(None, "folder of the checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
    search: SearchTokens = section(SearchTokens)
    evaluation: Evaluation = section(Evaluation)
