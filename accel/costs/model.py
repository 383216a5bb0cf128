"""Work of running a model's blocks and head, and memory of activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from hasten.accel.costs.estimate import Work
from hasten.accel.models.architecture import WAITING_STATES, Architecture, Layer
from hasten.accel.models.output_layer import TILE_TOKENS, tile_columns

# Elementwise operations of a block on a token, on vectors of the hidden size (norms, residuals, rotations) and of the
# inner size (activation and product).
_NARROW, _WIDE = 24, 4
# Operations of a block, including products.
_LAUNCHES = 60
# Operations for reading a tensor: opening its file, making its module.
_LAUNCHES_OF_A_TENSOR = 300
# Elementwise operations on a pair of query and key: the softmax of its score.
_SCORES = 3
# Vectors of a token in the widest part of a block, of the hidden size (input, residual, norm) and of the inner size
# (gate, up and their product).
_NARROW_HELD, _WIDE_HELD = 4, 3
# Operations on a tile of logits. Tensors of its size that live at once for a model: logits, exponentials, differences.
_TILE_LAUNCHES, _TILE_TENSORS = 20, 3
# Names of the number of a token's experts in configs.
_USED_EXPERTS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_selected_experts")
_CPU, _GPU = torch.device("cpu"), torch.device("cuda")
# Limit of freed memory that the C library does not return to the system.
_KEPT_BACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """Sizes of a checkpoint's model; dtype: in which it runs."""

    architecture: Architecture
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.architecture.num_blocks

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.architecture.hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.architecture.config.vocab_size)

    @property
    def inner(self) -> int:
        """Widest input of a linear layer: the inner size of the feed-forward network, or the hidden size."""
        return max(max(layer.columns for layer in self.architecture.linears(index)) for index in self._kinds())

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        config = self.architecture.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_attention_heads * size)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all blocks."""
        config = self.architecture.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(self.blocks * 2 * heads * size * self.dtype.itemsize)

    def block_elements(self, index: int) -> int:
        """Number of elements of a block's tensors."""
        checkpoint = self.architecture.checkpoint
        return sum(prod(checkpoint.shape(name)) for name in self.architecture.block_tensors(index))

    def block_bytes(self, index: int) -> int:
        """Bytes of a block in the dtype in which it runs."""
        return self.block_elements(index) * self.dtype.itemsize

    def largest_block(self) -> int:
        """Index of the largest block."""
        return max(self._kinds(), key=self.block_bytes)

    def streamed(self) -> tuple[int, int]:
        """Bytes of the largest block without its experts, and of one of their layers, as stored and as it runs."""
        architecture = self.architecture
        held = layers = 0
        for index in self._kinds():
            held = max(held, self.block_bytes(index) - self._experts_bytes(index))
            for layer in architecture.linears(index):
                if layer.expert is not None:
                    stored = architecture.checkpoint.dtype(f"{layer.name}.weight").itemsize
                    layers = max(layers, layer.rows * layer.columns * (self.dtype.itemsize + stored))
        return held, layers

    def waiting_at_experts(self, sequences: int, length: int, batch: int) -> int:
        """Bytes of the sequences that wait for experts at once, beside the hidden states, see Architecture.lots."""
        experts = max(map(self._experts_bytes, self._kinds()))
        one = WAITING_STATES * self.hidden_bytes(1, length)
        return min(sequences * one, max(batch * one, experts)) if experts else 0

    def _experts_bytes(self, index: int) -> int:
        return self.architecture.expert_weights(index) * self.dtype.itemsize

    def elements(self) -> int:
        """Number of elements of all tensors."""
        checkpoint = self.architecture.checkpoint
        return sum(prod(checkpoint.shape(name)) for name in checkpoint.names)

    def stored_bytes(self) -> int:
        """Bytes of all tensors as stored in the checkpoint."""
        checkpoint = self.architecture.checkpoint
        return sum(checkpoint.stored_bytes(name) for name in checkpoint.names)

    def head_bytes(self) -> int:
        """Bytes of the head as stored."""
        checkpoint, head = self.architecture.checkpoint, self.architecture.head_name()
        return checkpoint.nbytes(head)

    def streamed_head_bytes(self) -> int:
        """Bytes of the head that are held where it is read a tile at a time: all if its rows cannot be read alone."""
        checkpoint, head = self.architecture.checkpoint, self.architecture.head_name()
        return 0 if checkpoint.has_rows(head) else checkpoint.nbytes(head)

    def load(self, index: int) -> Work:
        """Work of reading a block and converting it to the dtype in which it runs."""
        checkpoint = self.architecture.checkpoint
        names = self.architecture.block_tensors(index)
        stored = sum(checkpoint.nbytes(name) for name in names)
        # Tensors are read, checked for values that are not finite, and converted.
        return Work(
            elements=2 * self.block_elements(index), launches=_LAUNCHES_OF_A_TENSOR * len(names), file_bytes=stored
        )

    def run(self, index: int, tokens: int, length: int, batch: int, without: str | None = None) -> Work:
        """Work of a block on `tokens` tokens in sequences of `length`. without: name of a layer that is not run."""
        share = self.active_share(index)
        layers = [layer for layer in self.architecture.linears(index) if layer.name != without]
        products = sum(2 * layer.rows * layer.columns * self._used(layer, share) for layer in layers)
        scores = 4 * length * self.attention
        heads = self.attention / max(1, self._head_size())
        small = _NARROW * self.hidden + _WIDE * self.inner + _SCORES * length * heads
        passes = -(-tokens // (batch * length))
        return Work(flops=tokens * (products + scores), elements=tokens * small, launches=passes * _LAUNCHES)

    def logits(self, tokens: int) -> Work:
        """Work of the logits of `tokens` tokens, in tiles of the vocabulary."""
        tiles = -(-tokens // TILE_TOKENS) * -(-self.vocabulary // self._tile_columns(_CPU))
        return Work(flops=2 * tokens * self.hidden * self.vocabulary, launches=tiles * _TILE_LAUNCHES)

    def tile_bytes(self, models: int = 1, gpu: bool = False) -> int:
        """Bytes of a tile of logits and of what is computed from it, for so many models, with the models' weights."""
        columns = self._tile_columns(_GPU if gpu else _CPU)
        head = self.architecture.checkpoint.dtype(self.architecture.head_name())
        weight = columns * self.hidden * (head.itemsize + self.dtype.itemsize)
        return models * (_TILE_TENSORS * 4 * TILE_TOKENS * columns + weight)

    def activation_bytes(self, batch: int, length: int) -> int:
        """Bytes of the activations in a block that runs `batch` sequences at once."""
        return batch * length * (_NARROW_HELD * self.hidden + _WIDE_HELD * self.inner) * self.dtype.itemsize

    def hidden_bytes(self, sequences: int, length: int) -> int:
        """Bytes of the hidden states of `sequences` sequences of `length` tokens."""
        return sequences * length * self.hidden * self.dtype.itemsize

    def waiting_bytes(self, sequences: int, length: int) -> int:
        """Bytes of sequences that wait in the middle of a block, where most is held.

        At the input of the attention's last layer these are the block's input, its norm, query, key, value and output;
        at that of the last layer, the block's input, the residual, its norm, and the inner values.
        """
        keys = self.token_bytes // (self.blocks * self.dtype.itemsize)
        widest = max(2 * self.hidden + 2 * self.attention + keys, 3 * self.hidden + self.inner)
        return sequences * length * widest * self.dtype.itemsize

    def active_share(self, index: int) -> float:
        """Share of a block's experts to which a token is routed; 1 without experts."""
        experts = [layer.expert for layer in self.architecture.linears(index) if layer.expert is not None]
        config = self.architecture.config
        used = next((count for name in _USED_EXPERTS if (count := getattr(config, name, None))), None)
        return min(1.0, used / (max(experts) + 1)) if experts and used else 1.0

    def _tile_columns(self, device: torch.device) -> int:
        return min(self.vocabulary, tile_columns(TILE_TOKENS, self.hidden, device))

    def _used(self, layer: Layer, share: float) -> float:
        return 1.0 if layer.expert is None else share

    def _head_size(self) -> int:
        return self.attention // int(self.architecture.config.num_attention_heads)

    def _kinds(self) -> list[int]:
        """Sample of blocks that contains the largest: a model may have two kinds, dense blocks and mixtures."""
        return sorted({0, self.blocks // 2, self.blocks - 1})


def with_retained(parts: Mapping[str, int], freed: int) -> dict[str, int]:
    """Parts of a process's memory, and the memory that its C library does not return of `freed` bytes."""
    return {**parts, "kept by the C library": min(_KEPT_BACK_BYTES, freed)}
