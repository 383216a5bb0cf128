"""Attention of the fast path: new nodes of several sequences over pre-allocated caches, in torch's operations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accel.decoding.targets.families.decoder import Decoder, Layer, soft_cap
from hasten.kernels.token_attention import token_attention

# The attention of the layers of a pass: layer, its cache, and queries, keys and values; see MaskedAttention.
Attention = Callable[[Layer, Any, Tensor], Tensor]


class Reach(NamedTuple):
    """What the nodes of a pass attend to in the layers of one window.

    first: first cache position that is read. mask: additive (B, 1, G * N, L - first); None if all of them are seen.
    """

    first: int
    mask: Tensor | None


class CacheAccess(NamedTuple):
    """Where a pass reads and writes the caches.

    slots: slots of the pass. first: the first slot if they are adjacent, else None. rows (B, 1), places (B, N): slots
    and cache positions of the new nodes; None if start is given. start: first position in the only slot, whose new
    nodes are then written by one copy. total: L, the end of the positions that are read. causal: whether the new nodes
    are the first tokens of a sequence, whose attention needs no mask. reaches: by the windows of layers.
    """

    first: int | None
    slots: list[int]
    rows: Tensor | None
    places: Tensor | None
    start: int | None
    total: int
    causal: bool
    reaches: Mapping[int | None, Reach]


class RotatedHeads:
    """Rotary embedding of the queries and keys of a pass over nodes at positions (B, N).

    tables: cosines and sines (capacity, D / 2, 2) of every rotation. in_place: whether rotations are complex products
    in place: only float32 has them, and torch.compile generates no code for them.
    """

    def __init__(self, decoder: Decoder, tables: Sequence[Tensor], positions: Tensor, in_place: bool) -> None:
        self._decoder, self._in_place, self._count = decoder, in_place, len(positions)
        self._turns = [table[positions.view(-1)][:, None] for table in tables]
        if in_place:
            self._turns = [torch.view_as_complex(turn) for turn in self._turns]

    def rotate(self, layer: Layer, qkv: Tensor) -> Tensor:
        """Queries, keys and values (rows, heads, D) with rotary embedding of queries and keys; in place if possible."""
        normalize(self._decoder, layer, qkv)
        return self.turn(layer, qkv)

    def turn(self, layer: Layer, qkv: Tensor) -> Tensor:
        """The same of queries and keys whose norms are applied."""
        size, both = self._decoder.head_size, self._decoder.heads + self._decoder.kv_heads
        turns = self._turns[layer.rotation]
        if self._in_place:
            torch.view_as_complex(qkv.view(len(qkv), -1, size // 2, 2)).narrow(1, 0, both).mul_(turns)
            return qkv
        cos, sin = turns.unbind(-1)
        one, other = qkv[:, :both].float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2).to(qkv.dtype)
        return torch.cat([rotated, qkv[:, both:]], 1)


class MaskedAttention(RotatedHeads):
    """The attention of the layers of a pass over B sequences of N nodes, given what its nodes read and write."""

    def __init__(
        self, decoder: Decoder, tables: Sequence[Tensor], positions: Tensor, access: CacheAccess, in_place: bool
    ) -> None:
        super().__init__(decoder, tables, positions, in_place)
        self._access = access

    def __call__(self, layer: Layer, cache: Tensor, qkv: Tensor) -> Tensor:
        """Outputs (B * N, H * G * D) of queries, keys and values (B * N, (H * G + 2 * H) * D), which are not rotated.

        Keys and values are written into the cache (slots, 2 * H, capacity, D) of the layer.
        """
        decoder, access = self._decoder, self._access
        heads, count = decoder.heads, self._count
        qkv = self.rotate(layer, qkv.view(len(qkv), -1, decoder.head_size))
        write(cache, qkv.narrow(1, heads, 2 * decoder.kv_heads), count, access)
        return attend(decoder, qkv.narrow(1, 0, heads), cache, count, layer.window, access)


class TokenAttention:
    """The attention of the layers of a pass over one new token of each sequence, by the kernel token_attention.

    slots: of the sequences. starts: committed tokens of each, which the new one follows.
    """

    def __init__(self, decoder: Decoder, tables: Sequence[Tensor], slots: Sequence[int], starts: Sequence[int]) -> None:
        self._decoder, self._slots, self._starts = decoder, slots, starts
        self._turns = [[table[start] for start in starts] for table in tables]

    def __call__(self, layer: Layer, cache: Tensor, qkv: Tensor) -> Tensor:
        """See MaskedAttention."""
        decoder = self._decoder
        rows = qkv.view(len(qkv), -1, decoder.head_size)
        normalize(decoder, layer, rows)
        outputs = [
            token_attention(
                own,
                turns,
                cache[slot],
                start,
                0 if layer.window is None else max(0, start + 1 - layer.window),
                decoder.scale,
                decoder.score_cap,
            )
            for own, turns, slot, start in zip(
                rows, self._turns[layer.rotation], self._slots, self._starts, strict=True
            )
        ]
        return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)


def normalize(decoder: Decoder, layer: Layer, qkv: Tensor) -> None:
    """Apply a layer's norms of queries and keys, if it has some, to (rows, heads, D), in place."""
    heads, both = decoder.heads, decoder.heads + decoder.kv_heads
    if layer.query_norm is not None and layer.key_norm is not None:
        qkv[:, :heads] = layer.query_norm(qkv[:, :heads])
        qkv[:, heads:both] = layer.key_norm(qkv[:, heads:both])


def write(cache: Tensor, new: Tensor, count: int, access: CacheAccess) -> None:
    """Write the new nodes' keys and values (rows, 2 * H, D) of `count` sequences into a layer's cache."""
    width = new.shape[0] // count
    if access.start is not None and access.first is not None:
        cache.select(0, access.first).narrow(1, access.start, width).copy_(new.transpose(0, 1))
    else:
        cache[access.rows, :, access.places] = new.view(count, width, *new.shape[1:])


def attend(
    decoder: Decoder, queries: Tensor, cache: Tensor, count: int, window: int | None, access: CacheAccess
) -> Tensor:
    """Attention outputs (rows, H * G * D) of the queries (rows, H * G, D) of `count` sequences.

    cache: keys and values (slots, 2 * H, capacity, D) of the layer, the new nodes' own among them.
    """
    heads, kv_heads, size = decoder.heads, decoder.kv_heads, decoder.head_size
    groups, width = heads // kv_heads, queries.shape[0] // count
    reach = access.reaches[window]
    cached = cache[access.slots] if access.first is None else cache.narrow(0, access.first, count)
    cached = cached.narrow(2, reach.first, access.total - reach.first)
    if access.causal and reach.mask is None:
        return attend_chain(decoder, queries, cached)
    keys, values = cached.narrow(1, 0, kv_heads), cached.narrow(1, kv_heads, kv_heads)
    if width == 1:
        queries = queries.view(count, kv_heads, groups, size)
    else:
        queries = queries.reshape(count, width, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
        queries = queries.reshape(count, kv_heads, groups * width, size)
    if decoder.score_cap is None:
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=reach.mask, scale=decoder.scale)
    else:
        attended = _capped(queries, keys, values, reach.mask, decoder.scale, decoder.score_cap)
    if width > 1:
        attended = attended.view(count, kv_heads, groups, width, size).permute(0, 3, 1, 2, 4)
    return attended.reshape(count * width, heads * size)


def attend_chain(decoder: Decoder, queries: Tensor, cached: Tensor) -> Tensor:
    """Attention outputs (N, H * G * D) of the first N tokens of one sequence.

    queries: (N, H * G, D). cached: their keys and values (1, 2 * H, N, D). It skips the half of the
    scores that a mask would remove.
    """
    keys, values = cached.chunk(2, 1)
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        is_causal=True,
        scale=decoder.scale,
        enable_gqa=decoder.heads > decoder.kv_heads,
    )
    return attended[0].transpose(0, 1).reshape(len(queries), -1)


def _capped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """scaled_dot_product_attention with a soft cap of the scores, which torch's does not have."""
    scores = soft_cap(queries @ keys.mT * scale, cap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
