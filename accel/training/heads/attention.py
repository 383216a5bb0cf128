"""Causal attention of heads over the tokens of their sequence: trained on packed windows, used with a cache.

A layer is Llama's, with rotary positions and grouped queries. In use, `extend` reads new committed tokens into the
cache of their sequence, and `extend_path` runs nodes of draft trees, which attend to the cache without a copy of it and
to the nodes above them. All three ways give the same output for the same tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accel.training.heads.draft_head import CachingModule, TargetFacts

_FIRST_CAPACITY = 64


def block_causal(segments: Tensor) -> Tensor:
    """Mask (B, 1, T, T) bool for windows (B, T): a token attends to itself and to earlier ones of its document."""
    count = segments.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=segments.device).tril()
    return (earlier & (segments[:, :, None] == segments[:, None]))[:, None]


class KeyValueCache:
    """Keys and values of the tokens of one sequence; its memory is doubled when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._held = torch.empty(0)

    def append(self, new: Tensor) -> None:
        """Add keys and values (N, 2, H, D) of the next tokens, keys first."""
        count, _, heads, size = new.shape
        needed = self.length + count
        capacity = self._held.shape[2] if self.length else 0
        if needed > capacity:
            grown = new.new_empty(2, heads, max(2 * capacity, needed, _FIRST_CAPACITY), size)
            if self.length:
                grown[:, :, : self.length] = self.read()
            self._held = grown
        self._held[:, :, self.length : needed] = new.permute(1, 2, 0, 3)
        self.length = needed

    def read(self) -> Tensor:
        """Keys and values (2, H, T, D), a view."""
        return self._held[:, :, : self.length]


class Attention(CachingModule):
    """Attention with grouped queries, as many heads as the target has.

    input_size: C, width of the inputs; None takes the target's D. Outputs have the target's D. The rotary embedding is
    plain, with the target's base.
    """

    inverse_frequencies: Tensor

    def __init__(self, target: TargetFacts, input_size: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = target.heads, target.kv_heads, target.head_dim
        inputs = input_size or target.hidden_size
        self.qkv = nn.Linear(inputs, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, target.hidden_size, bias=False)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.register_buffer("inverse_frequencies", target.rope_theta**-exponents, persistent=False)
        self._table: tuple[Tensor, Tensor] | None = None

    def cache_values(self, tokens: int) -> int:
        """Those of a `KeyValueCache`."""
        return 2 * self.kv_heads * self.head_dim * max(2 * tokens, _FIRST_CAPACITY)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries (…, H * G, D) and, next to each other, rotated keys and values (…, 2, H, D).

        x: (…, C). positions: (…), integers.
        """
        return self._project(x, *self._rotation(positions))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (…, 1, D / 2) of positions (…)."""
        # float32, because in bfloat16 a position times a frequency is wrong by whole rotations.
        angles = (positions[..., None].float() * self.inverse_frequencies)[..., None, :]
        return angles.cos(), angles.sin()

    def _rotations_of(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Those of spans (first position, count) one after the other, from a table: computing them takes long."""
        needed = max(first + count for first, count in spans)
        if self._table is None or len(self._table[0]) < needed:
            size = max(2 * needed, _FIRST_CAPACITY)
            self._table = self._rotation(torch.arange(size, device=self.inverse_frequencies.device))
        cos, sin = ([of.narrow(0, first, count) for first, count in spans] for of in self._table)
        return (cos[0], sin[0]) if len(spans) == 1 else (torch.cat(cos), torch.cat(sin))

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `project`."""
        projected = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        turned, values = projected.split([self.heads + self.kv_heads, self.kv_heads], -2)
        one, other = turned.chunk(2, -1)
        turned = torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(values.dtype)
        queries, keys = turned.split([self.heads, self.kv_heads], -2)
        return queries, torch.stack([keys, values], -3)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Outputs (B, T, D) of windows x (B, T, C). positions: (B, T). mask: see `block_causal`."""
        queries, both = self.project(x, positions)
        # Some of torch's attention kernels take no mask together with grouped queries.
        keys, values = both.repeat_interleave(self.heads // self.kv_heads, 3).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def extend(
        self, caches: Sequence[KeyValueCache], x: Tensor, counts: Sequence[int], last_only: bool = True
    ) -> Tensor:
        """Add the next tokens of B sequences to their caches; outputs (B, D) of the last token of each.

        x: (N, C), the tokens of all sequences, one after the other. counts: tokens of each, 1 or more. last_only:
        whether outputs are those of the last tokens only; if not, of all, (N, D).
        """
        spans = [(cache.length, count) for cache, count in zip(caches, counts, strict=True)]
        queries, both = self._project(x, *self._rotations_of(spans))
        attended = []
        for cache, own, new in zip(caches, queries.split(list(counts)), both.split(list(counts)), strict=True):
            cache.append(new)
            attended.append(self._attend(cache, own[-1:] if last_only else own))
        out: Tensor = self.out(attended[0] if len(attended) == 1 else torch.cat(attended))
        return out

    def _attend(self, cache: KeyValueCache, queries: Tensor) -> Tensor:
        """Outputs (N, heads * D) of the last N tokens of a cache; queries: (N, heads, D)."""
        count, groups = len(queries), self.heads // self.kv_heads
        keys, values = cache.read()
        # The query heads of a KV head are folded into the rows.
        folded = queries.view(count, self.kv_heads, groups, self.head_dim).transpose(0, 1).flatten(1, 2)
        mask = None
        if count > 1:
            mask = torch.ones(count, cache.length, dtype=torch.bool, device=queries.device)
            mask = mask.tril(cache.length - count).repeat_interleave(groups, 0)
        attended = F.scaled_dot_product_attention(folded[None], keys[None], values[None], attn_mask=mask)[0]
        return attended.view(self.kv_heads, count, groups, self.head_dim).transpose(0, 1).reshape(count, -1)

    def extend_path(
        self, caches: Sequence[KeyValueCache], sequence: Tensor, x: Tensor, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (M, D) of M nodes of draft trees, and their paths (M, P + 1, 2, H, D) for their children.

        A node attends to the cache of its sequence and to its path, itself at its end. The caches do not change.
        sequence: (M,) int64, index of each node's cache. x: (M, C). path: (M, P, 2, H, D), that of each node's parent;
        None for nodes without a parent in the tree.
        """
        above = 0 if path is None else path.shape[1]
        rows = sequence.tolist()
        places = {caches[row].length + above for row in rows}
        # Nodes of one sequence have one position.
        spans = [(caches[row].length + above, 1) for row in (rows if len(places) > 1 else rows[:1])]
        queries, both = self._project(x, *self._rotations_of(spans))
        path = both[:, None] if path is None else torch.cat([path, both[:, None]], 1)
        return self.out(self.attend_path(caches, rows, queries, path)), path

    def attend_path(
        self, caches: Sequence[KeyValueCache], rows: Sequence[int], queries: Tensor, path: Tensor
    ) -> Tensor:
        """Attention (M, heads * D) of M queries to the cache of their sequence and to their path.

        rows: index of each query's cache. queries: (M, heads, D). path: (M, P, 2, H, D), P >= 0.
        """
        above = path.shape[1]
        own_keys, own_values = path.unbind(2)  # (M, P, H, D) each
        groups = self.heads // self.kv_heads
        queries = (queries * self.head_dim**-0.5).unflatten(1, (self.kv_heads, groups))  # (M, H, G, D)
        own = queries @ own_keys.permute(0, 2, 3, 1)  # (M, H, G, P)
        own_values = own_values.transpose(1, 2)
        attended = queries.new_empty(len(rows), self.heads * self.head_dim)
        for number, cache in enumerate(caches):
            nodes = [node for node, row in enumerate(rows) if row == number]
            if not nodes:
                continue
            part: slice | list[int] = slice(None) if len(nodes) == len(rows) else nodes
            keys, values = cache.read()
            folded = queries[part].transpose(0, 1).flatten(1, 2)  # (H, m * G, D)
            scores = (folded @ keys.mT).unflatten(1, (len(nodes), groups)).transpose(0, 1)
            probs = torch.cat([scores, own[part]], -1).softmax(-1, dtype=torch.float32).to(values.dtype)
            far, near = probs.split([cache.length, above], -1)
            result = (far.transpose(0, 1).flatten(1, 2) @ values).unflatten(1, (len(nodes), groups)).transpose(0, 1)
            attended[part] = (result + near @ own_values[part]).flatten(1)
        return attended


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x), with the target's sizes."""

    def __init__(self, target: TargetFacts) -> None:
        super().__init__()
        self.gate_up = nn.Linear(target.hidden_size, 2 * target.intermediate_size, bias=False)
        self.down = nn.Linear(target.intermediate_size, target.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """A decoder layer with the target's sizes; its methods are those of `Attention`, with norms, residuals and MLP."""

    def __init__(self, target: TargetFacts) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(target.hidden_size, target.rms_norm_eps)
        self.attention = Attention(target)
        self.mlp_norm = nn.RMSNorm(target.hidden_size, target.rms_norm_eps)
        self.mlp = SwiGLU(target)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), see `Attention.forward`."""
        return self.finish(x, self.attention(self.attention_norm(x), positions, mask))

    def extend(
        self, caches: Sequence[KeyValueCache], x: Tensor, counts: Sequence[int], last_only: bool = True
    ) -> Tensor:
        """Outputs (B, D) or (N, D), see `Attention.extend`."""
        attended = self.attention.extend(caches, self.attention_norm(x), counts, last_only)
        if last_only and len(x) > len(counts):
            x = torch.stack([part[-1] for part in x.split(list(counts))])
        return self.finish(x, attended)

    def extend_path(
        self, caches: Sequence[KeyValueCache], sequence: Tensor, x: Tensor, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (M, D) and paths, see `Attention.extend_path`."""
        attended, path = self.attention.extend_path(caches, sequence, self.attention_norm(x), path)
        return self.finish(x, attended), path

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, for inputs x and its outputs, (…, D) both."""
        x = x + attended
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
