"""Cost of a model that is divided over the ranks of a group: memory of a rank, and bytes between ranks in a pass."""

from dataclasses import dataclass

from hasten.accel.costs.model import Model

# Sums over the ranks in a block: of the attention's output, and of the feed-forward network's.
_SUMS_OF_A_BLOCK = 2
# Memory of a process after the import of DeepSpeed 0.19 without MLflow, in addition to the other packages; measured.
DEEPSPEED_BYTES = 24 * 10**6


@dataclass(frozen=True)
class Ranks:
    """Division of a model over `size` ranks.

    collects: whether every rank runs the whole model and collects a block's weights when it runs, as ZeRO-3 does; else
    ranks divide the work of every layer. offload: where the ranks' parts of the weights are then: None is the device,
    `cpu` main memory, and else a disk.
    """

    size: int
    collects: bool = False
    offload: str | None = None

    def weights(self, model: Model) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of a rank's weights on the device, and of those in main memory if they are offloaded."""
        item = model.dtype.itemsize
        blocks = sum(model.block_bytes(index) for index in range(model.blocks))
        outside = model.elements() * item - blocks
        if not self.collects:
            return {"weights": blocks // self.size + outside}, {}
        # A block that runs, the next one, and the embedding and the head.
        part, block = (blocks + outside) // self.size, model.block_bytes(model.largest_block())
        collected = {"collected weights": 2 * block + outside}
        if self.offload is None:
            return {"weights": part} | collected, {}
        return collected, {"weights": part} if self.offload == "cpu" else {"read from disk": 2 * block // self.size}

    def loading(self, model: Model) -> int:
        """Bytes of the block that a rank holds whole while the model is loaded."""
        return model.block_bytes(model.largest_block())

    def block_weights(self, model: Model) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of a rank's part of a block that is loaded alone, on the device, and in main memory if offloaded.

        One that collects weights collects those of a single layer at a time.
        """
        index, item = model.largest_block(), model.dtype.itemsize
        layers = [layer.rows * layer.columns * item for layer in model.architecture.linears(index)]
        rest = model.block_bytes(index) - sum(layers)
        part = -(-sum(layers) // self.size)
        if not self.collects:
            return {"weights of a block": part + rest}, {"block as it is loaded": model.block_bytes(index)}
        collected = {"collected layer": max(layers)}
        if self.offload is None:
            return {"weights of a block": part + rest} | collected, {}
        return {"weights of a block": rest} | collected, {"offloaded weights of a block": part}

    def block_moved(self, model: Model, index: int, rows: float) -> int:
        """Bytes between the ranks of a group to run one block on `rows` tokens of all its sequences together."""
        item = model.dtype.itemsize
        if self.collects:
            layers = sum(layer.rows * layer.columns for layer in model.architecture.linears(index))
            return (self.size - 1) * layers * item
        return int(2 * (self.size - 1) * _SUMS_OF_A_BLOCK * rows * model.hidden * item)

    def cache_share(self) -> float:
        """Share of the keys and values that a rank holds."""
        return 1.0 if self.collects else 1 / self.size

    def moved(self, model: Model, rows: float) -> int:
        """Bytes between the ranks of a group in a pass over `rows` tokens, of all sequences together."""
        item = model.dtype.itemsize
        if self.collects:
            return (self.size - 1) * model.elements() * item
        # A ring sends each sum around twice.
        return int(2 * (self.size - 1) * _SUMS_OF_A_BLOCK * model.blocks * rows * model.hidden * item)
