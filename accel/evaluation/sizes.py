"""What a checkpoint takes: exact bits per weight, and bytes on disk.

Counted for a quantized layer: its packed codes with their padding, scales, zero points and group indices. Not counted:
the shape that compressed-tensors stores next to them (16 bytes a layer, whatever the layer's size); it is in the
bytes on disk, as are the files' headers.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint.

    weights, stored_bytes: of the quantized layers; total_weights, total_bytes: of all tensors. disk_bytes: all
    safetensors files.
    """

    weights: int
    stored_bytes: int
    total_weights: int
    total_bytes: int
    disk_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers; of the whole model where nothing is quantized."""
        return 8 * self.stored_bytes / self.weights if self.weights else self.model_bits_per_weight

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per weight over all tensors, embeddings and norms among them; tied ones are stored and counted once."""
        return 8 * self.total_bytes / self.total_weights

    def metrics(self) -> dict[str, float | int]:
        """Sizes under the report's keys."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_model": self.model_bits_per_weight,
            "bytes": self.disk_bytes,
        }


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Sizes from the files' headers; no tensor is read."""
    weights = stored = total_weights = total_bytes = 0
    for name in checkpoint.names:
        count, taken = math.prod(checkpoint.shape(name)), checkpoint.stored_bytes(name)
        total_weights += count
        total_bytes += taken
        if checkpoint.quantization(name) is not None:
            weights += count
            stored += taken
    return Sizes(weights, stored, total_weights, total_bytes, disk_bytes(checkpoint.path))


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
