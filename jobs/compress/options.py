"""Options of `hasten compress`."""

from dataclasses import dataclass
from typing import Any

from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.jobs.common.schema import (
    FORMAT,
    FORMATS,
    GATE,
    GROUP_SIZE,
    MODEL,
    Calibrated,
    CalibratorGroup,
    Evaluation,
    GgufFile,
    group,
    option,
    section,
)


@dataclass
class CompressConfig(Calibrated):
    """Quantize or prune a checkpoint on a local or remote Ray cluster; resumable."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    scheme: str | None = option(
        None,
        "what layers become, by the name that servers use, in place of level, bits and symmetric; w4a16, w8a16 and "
        "w4a8 have groups of group_size",
        choices=tuple(SCHEMES),
    )
    level: str | None = option(
        None,
        "level by its name, such as w4g128, c2.5 or s50; null is scheme, or else the level of bits, group_size and "
        "symmetric; levels that no loader reads are stored dense, and bits_per_weight still counts their packed size",
    )
    format: str = option("compressed_tensors", FORMAT, choices=FORMATS)
    quantizer: dict[str, Any] = group("method that quantizes a layer")
    column_quantizer: dict[str, Any] = group("method for levels with bits per column, like c2.5")
    pruner: dict[str, Any] = group("method that prunes a layer, for levels like s50")
    bits: int = option(4, "bits of a quantized weight", at_least=2, at_most=8)
    group_size: int | str = option("auto", f"{GROUP_SIZE}; -1 is one scale per row", at_least=-1, words=("auto",))
    symmetric: bool = option(False, "symmetric grids, without zero points")
    head_bits: int | None = option(
        None,
        "bits of a weight of the output layer, on symmetric grids; null leaves it as it is; if it shares a tensor with "
        "the embedding, head_bits or embedding_bits stands for both",
        at_least=2,
        at_most=8,
    )
    embedding_bits: int | None = option(
        None, "the same for the embedding, which is rounded to nearest", at_least=2, at_most=8
    )
    head_group_size: int | str | None = option(
        None, "columns of the output layer that share a scale; null is group_size", at_least=-1, words=("auto",)
    )
    embedding_group_size: int | str | None = option(
        None, "columns of the embedding that share a scale; null is group_size", at_least=-1, words=("auto",)
    )
    output: str | None = option(None, "folder of the compressed checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "discard the output of an earlier run and start again")
    gate: list[str] = option([], GATE)
    gguf: GgufFile = section(GgufFile)
    evaluation: Evaluation = section(Evaluation)
    target_group: CalibratorGroup = section(CalibratorGroup)
