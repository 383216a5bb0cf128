"""Options of `hasten levels`, and those that a search shares."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import MODEL, Calibrated, group, option


@dataclass
class LevelOptions(Calibrated):
    """What decides a level database."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    quantizer: dict[str, Any] = group("how the codes of a layer are chosen")
    bits: list[int] = option([2, 3, 4, 5, 6, 8], "bits of a weight, each with each of group_sizes a level; [] is none")
    group_sizes: list[int] = option([128], "input columns that share a scale; -1 is one scale a row")
    symmetric: bool = option(
        True, "no zero points; transformers loads mixed levels with zero points only if all are the same"
    )
    column_quantizer: dict[str, Any] = group(
        "how a layer's bits are spread over its columns, where there are column_bits"
    )
    column_bits: list[float] = option(
        [],
        "average bits of a layer's columns, which get whole bits of their own, each a level; stored so in the level "
        "database, dense in the checkpoint",
    )
    pruner: dict[str, Any] = group("which weights of a layer are zeroed, where there are sparsities")
    sparsities: list[float] = option([], "shares of a layer's weights that are zeroed, each a level")
    extra_levels: list[str] = option([], "names of further levels, of any kind, such as w4g64a, c2.5 or s50")
    reference: int = option(
        3,
        "bits of the level whose output the next block is calibrated on; without bits it is the lowest sparsity, "
        "without those the most column_bits, without these the last of extra_levels",
        at_least=2,
        at_most=8,
    )


@dataclass
class LevelsConfig(LevelOptions):
    """Quantize every layer at every level, for searches to choose from; started again, it goes on where it stopped."""

    output: str | None = option(None, "folder of the level database; null is runs/levels/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
