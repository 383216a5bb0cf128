"""Options of `hasten levels`, and those that a search shares."""

from dataclasses import dataclass
from typing import Any

from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.jobs.common.schema import GROUP_SIZE, MODEL, Calibrated, group, option


@dataclass
class LevelOptions(Calibrated):
    """Options that determine a level database."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    quantizer: dict[str, Any] = group("method that quantizes a layer")
    bits: list[int] = option(
        [2, 3, 4, 5, 6, 8], "bits of a weight; each with each of group_sizes is a level; [] is none"
    )
    group_sizes: list[int | str] = option(
        ["auto", -1], f"{GROUP_SIZE}; -1 is one scale per row, a step between two numbers of bits", words=("auto",)
    )
    symmetric: bool = option(
        True, "no zero points; transformers loads levels with zero points only if all layers have the same bits"
    )
    column_quantizer: dict[str, Any] = group("method for levels with bits per column, for column_bits")
    column_bits: list[float] = option(
        [],
        "average bits over a layer's columns, each of which gets whole bits of its own; each average is a level, "
        "stored packed in the level database and dense in the checkpoint",
    )
    pruner: dict[str, Any] = group("method that prunes a layer, for sparsities")
    sparsities: list[float] = option([], "fractions of a layer's weights that are zeroed, each a level")
    schemes: list[str] = option(
        [],
        "further levels by the names that servers use, such as nvfp4 and fp8: "
        f"{', '.join(SCHEMES)}; with rounded inputs where they have them",
    )
    extra_levels: list[str] = option([], "names of further levels, of any kind, such as w4g64a, c2.5 or s50")
    head_bits: list[int] = option(
        [],
        "bits of a weight of the output layer, on symmetric grids, each a level of its own; [] leaves it as it is; if "
        "it shares a tensor with the embedding, head_bits or embedding_bits stands for both",
    )
    embedding_bits: list[int] = option([], "the same for the embedding, which is rounded to nearest")
    head_group_size: int | str = option(
        "auto", "columns of the output layer that share a scale", at_least=-1, words=("auto",)
    )
    embedding_group_size: int | str = option(
        "auto", "columns of the embedding that share a scale", at_least=-1, words=("auto",)
    )
    reference: int = option(
        3,
        "bits of the level whose output calibrates the next block; with bits=[] it is the last of schemes, else the "
        "lowest of sparsities, else the highest of column_bits, else the last of extra_levels",
        at_least=2,
        at_most=8,
    )


@dataclass
class LevelsConfig(LevelOptions):
    """Compress every layer at every level, for searches to choose from; resumable."""

    output: str | None = option(None, "folder of the level database; null is runs/levels/NAME", path="out")
    overwrite: bool = option(False, "discard the output of an earlier run and start again")
