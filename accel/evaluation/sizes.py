"""Size of a checkpoint: exact bits per weight, and bytes on disk.

The size of a quantized layer includes its packed codes with their padding, scales, zero points and group indices. It
excludes the shape that compressed-tensors stores (16 bytes a layer of any size), which counts in the bytes on disk, as
the files' headers do.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.tensor_names import is_outer


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint.

    weights, stored_bytes: number of weights and bytes of the quantized layers. block_weights, block_bytes: of those
    inside the blocks, that is, without output layer and embedding. total_weights, total_bytes: the same of
    all tensors. disk_bytes: size of all files with weights.
    """

    weights: int
    stored_bytes: int
    block_weights: int
    block_bytes: int
    total_weights: int
    total_bytes: int
    disk_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers; of the whole model where nothing is quantized."""
        return 8 * self.stored_bytes / self.weights if self.weights else self.model_bits_per_weight

    @property
    def block_bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers inside the blocks; bits_per_weight where there are none."""
        return 8 * self.block_bytes / self.block_weights if self.block_weights else self.bits_per_weight

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per weight over all tensors, including embeddings and norms; tied ones are stored and counted once."""
        return 8 * self.total_bytes / self.total_weights

    def metrics(self) -> dict[str, float | int]:
        """Sizes by the report's keys."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_blocks": self.block_bits_per_weight,
            "bits_per_weight_model": self.model_bits_per_weight,
            "bytes": self.disk_bytes,
        }


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Sizes from the files' headers; no tensor is read."""
    weights = stored = block_weights = block_bytes = total_weights = total_bytes = 0
    for name in checkpoint.names:
        count, size = math.prod(checkpoint.shape(name)), checkpoint.stored_bytes(name)
        total_weights += count
        total_bytes += size
        if checkpoint.is_quantized(name):
            weights += count
            stored += size
            if not is_outer(name):
                block_weights += count
                block_bytes += size
    return Sizes(weights, stored, block_weights, block_bytes, total_weights, total_bytes, disk_bytes(checkpoint.path))


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files, or of its GGUF file."""
    files = [*Path(folder).glob("*.safetensors")] or [*Path(folder).glob("*.gguf")]
    return sum(file.stat().st_size for file in files)
