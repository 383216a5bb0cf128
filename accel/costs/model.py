"""Arithmetic of running a model's blocks and head, and memory of activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from hasten.accel.costs.estimate import Work
from hasten.accel.models.architecture import Architecture, Layer

# Numbers of the hidden size, and of the inner size, that go through small operations for a token of a block: norms,
# residuals, rotations; activation and product.
_NARROW, _WIDE = 24, 4
# Operations of a block, products among them.
_LAUNCHES = 60
# Of a tensor that is read: its file is opened, its module is made.
_LAUNCHES_OF_A_TENSOR = 300
# Numbers for a query and a key: what softmax makes of their product.
_SCORES = 3
# Of a token, in the widest part of a block: what came in, the residual and the norm; gate, up and their product.
_NARROW_HELD, _WIDE_HELD = 4, 3
_LOGITS_BYTES = 4 << 20
# Most of what was freed that the C library does not give back to the system.
_KEPT_BACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """Sizes of a checkpoint's model that runs in a dtype."""

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
        """Widest input of a layer: that of the feed-forward network's last one, or the hidden size."""
        return max(max(layer.columns for layer in self.architecture.linears(index)) for index in self._kinds())

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        config = self.architecture.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_attention_heads * size)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all blocks together."""
        config = self.architecture.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(self.blocks * 2 * heads * size * self.dtype.itemsize)

    def block_elements(self, index: int) -> int:
        """Numbers in a block's tensors."""
        checkpoint = self.architecture.checkpoint
        return sum(prod(checkpoint.shape(name)) for name in self.architecture.block_tensors(index))

    def block_bytes(self, index: int) -> int:
        """Bytes of a block in the dtype that it runs in."""
        return self.block_elements(index) * self.dtype.itemsize

    def largest_block(self) -> int:
        """Number of the block that takes most."""
        return max(self._kinds(), key=self.block_bytes)

    def elements(self) -> int:
        """Numbers in all tensors."""
        checkpoint = self.architecture.checkpoint
        return sum(prod(checkpoint.shape(name)) for name in checkpoint.names)

    def stored_bytes(self) -> int:
        """Bytes of all tensors as the checkpoint has them."""
        checkpoint = self.architecture.checkpoint
        return sum(checkpoint.stored_bytes(name) for name in checkpoint.names)

    def head_bytes(self) -> int:
        """Bytes of the head as it is stored."""
        checkpoint, head = self.architecture.checkpoint, self.architecture.head_name()
        return checkpoint.nbytes(head)

    def load(self, index: int) -> Work:
        """Reading a block and turning it into the dtype it runs in."""
        checkpoint = self.architecture.checkpoint
        names = self.architecture.block_tensors(index)
        stored = sum(checkpoint.nbytes(name) for name in names)
        # Read, looked through for what is not finite, converted.
        return Work(
            elements=2 * self.block_elements(index), launches=_LAUNCHES_OF_A_TENSOR * len(names), file_bytes=stored
        )

    def run(self, index: int, tokens: int, length: int, batch: int, without: str | None = None) -> Work:
        """Running a block on `tokens` tokens in sequences of `length`; without: name of a layer that is not run."""
        share = self.active_share(index)
        layers = [layer for layer in self.architecture.linears(index) if layer.name != without]
        products = sum(2 * layer.rows * layer.columns * self._used(layer, share) for layer in layers)
        scores = 4 * length * self.attention
        heads = self.attention / max(1, self._head_size())
        small = _NARROW * self.hidden + _WIDE * self.inner + _SCORES * length * heads
        passes = -(-tokens // (batch * length))
        return Work(flops=tokens * (products + scores), elements=tokens * small, launches=passes * _LAUNCHES)

    def logits(self, tokens: int) -> Work:
        """Logits of `tokens` tokens."""
        at_once = max(1, _LOGITS_BYTES // (4 * self.vocabulary))
        return Work(flops=2 * tokens * self.hidden * self.vocabulary, launches=-(-tokens // at_once) * 10)

    def activation_bytes(self, batch: int, length: int) -> int:
        """Bytes between the layers of a block that runs so many sequences at once."""
        return batch * length * (_NARROW_HELD * self.hidden + _WIDE_HELD * self.inner) * self.dtype.itemsize

    def hidden_bytes(self, sequences: int, length: int) -> int:
        """Bytes of the hidden states of sequences of one length."""
        return sequences * length * self.hidden * self.dtype.itemsize

    def active_share(self, index: int) -> float:
        """Share of a block's experts that a token goes through; 1 where there are none."""
        config = self.architecture.config
        number = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        used: int | None = getattr(config, "num_experts_per_tok", None)
        return min(1.0, used / number) if number and used else 1.0

    def _used(self, layer: Layer, share: float) -> float:
        return 1.0 if layer.expert is None else share

    def _head_size(self) -> int:
        return self.attention // int(self.architecture.config.num_attention_heads)

    def _kinds(self) -> list[int]:
        """Blocks to look at for the largest: a model may have two kinds, dense ones and mixtures."""
        return sorted({0, self.blocks // 2, self.blocks - 1})


def with_kept_back(parts: Mapping[str, int], freed: int) -> dict[str, int]:
    """Parts of a process's memory, and what its C library keeps of so many bytes that come and go."""
    return {**parts, "kept by the C library": min(_KEPT_BACK_BYTES, freed)}
