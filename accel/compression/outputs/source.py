"""What a checkpoint must be to be compressed: plain, or quantized by others, whose weights are then the original's."""

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import original_of


def check_source(checkpoint: Checkpoint) -> None:
    """UserError for an output whose original is at hand."""
    if checkpoint.quantized_by is None or not checkpoint.is_compressed:
        return
    original = original_of(checkpoint.path)
    if original is not None:
        raise UserError(f"model={checkpoint.path} is compressed already: give the original checkpoint, {original}")
