"""Options of `hasten compress`."""

from dataclasses import dataclass
from typing import Any

from hasten.jobs.common.schema import MODEL, Calibrated, Evaluation, group, option, section


@dataclass
class CompressConfig(Calibrated):
    """Quantize a checkpoint on a local or remote Ray cluster; started again, it goes on where it was stopped."""

    model: str = option("embedded:target", f"what to compress: {MODEL}", path="in")
    level: str | None = option(
        None,
        "name of a level of any kind, such as w4g128, c2.5 or s50; what no loader reads packed lies dense in the "
        "checkpoint, and bits_per_weight counts the level; null is bits, group_size and symmetric",
    )
    quantizer: dict[str, Any] = group("how the codes of a layer are chosen")
    column_quantizer: dict[str, Any] = group("how a layer's bits are spread over its columns, for levels like c2.5")
    pruner: dict[str, Any] = group("which weights of a layer are zeroed, for levels like s50")
    bits: int = option(4, "bits of a quantized weight", at_least=2, at_most=8)
    group_size: int = option(128, "input columns that share a scale; -1 is one scale a row", at_least=-1)
    symmetric: bool = option(False, "no zero points")
    output: str | None = option(None, "folder of the compressed checkpoint; null is runs/models/NAME", path="out")
    overwrite: bool = option(False, "throw away what output holds, if it is an earlier run's, and start again")
    evaluation: Evaluation = section(Evaluation)
