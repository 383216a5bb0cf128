"""DFlash: a small transformer fills a block of masks in one pass, attending to the target's states of the context.

Source: Chen et al. 2026, arXiv:2602.06036, and its code, github.com/z-lab/dflash.
Keys and values of a layer are of the context, projected from the target's states of several layers, and of the block
itself, in which attention goes both ways. Departs from it: the mask is a vector of its own, because most vocabularies
have no token for it; the output layer is trained and drafts from a reduced vocabulary; queries and keys are not
normalised; the loss is the cross-entropy with the target's own distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import check_fields
from hasten.accel.training.division import rand
from hasten.accel.training.heads.draft_head import (
    CachingModule,
    DepthTargets,
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    ParallelNetwork,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss

# Layers of the target below which the paper's choice of layers leaves too few to choose from.
_FEW_LAYERS = 8
_FIRST_CAPACITY = 256


def spread_layers(layers: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` hidden states of a target of `layers` layers, evenly spread as in the paper.

    They are from the second layer to the third to last one; of a target of few layers, up to the last one. Numbers that
    coincide are given once.
    """
    # As in the paper, numbers are rounded before the embedding's is added: 7.5 is layer 8, whose output is state 9.
    first, last = (1, layers - 3) if layers >= _FEW_LAYERS else (0, layers - 1)
    if count == 1:
        return (1 + (first + last) // 2,)
    numbers = sorted({1 + round(first + index * (last - first) / (count - 1)) for index in range(count)})
    # Targets have the state after the last layer behind the final norm only.
    return tuple(FINAL if number == layers else number for number in numbers)


class DFlashLayer(CachingModule):
    """A decoder layer whose keys and values come from the context and from its own input."""

    def __init__(self, target: TargetFacts) -> None:
        super().__init__()
        size, eps = target.hidden_size, target.rms_norm_eps
        self.heads, self.kv_heads, self.head_dim = target.heads, target.kv_heads, target.head_dim
        self.norm, self.mlp_norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.query = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.key_value = nn.Linear(size, 2 * self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self.gate_up = nn.Linear(size, 2 * target.intermediate_size, bias=False)
        self.down = nn.Linear(target.intermediate_size, size, bias=False)

    def cache_values(self, tokens: int) -> int:
        """The layer's part of a `_Context`."""
        return 2 * self.kv_heads * self.head_dim * max(2 * tokens, _FIRST_CAPACITY)

    def keys_values(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Keys and values (…, 2, H, D) of x (…, size); rotation: (…, 1, D / 2) of their positions."""
        both = self.key_value(x).unflatten(-1, (2, self.kv_heads, self.head_dim))
        keys, values = both.unbind(-3)
        return torch.stack([rotated(keys, rotation), values], -3)

    def queries(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Queries (…, heads, D) of x (…, size)."""
        return rotated(self.query(x).unflatten(-1, (self.heads, self.head_dim)), rotation)

    def mixed(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output (…, size) from its input and the result of attention (…, heads, D)."""
        x = x + self.out(attended.flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        output: Tensor = x + self.down(F.silu(gate) * up)
        return output


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Heads (…, heads, D) with rotary embedding; rotation: angles (…, 1, D / 2), complex numbers of length 1."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).float()) * rotation).flatten(-2).to(x)


class _Context:
    """Keys and values of a sequence's tokens in all layers, with room for a block behind them. length: tokens."""

    def __init__(self) -> None:
        self.held = torch.empty(0)
        self.length = 0

    def append(self, new: Tensor, room: int) -> None:
        """Add keys and values (layers, 2, H, N, D), and see that `room` more fit."""
        length = self.length + new.shape[3]
        if self.held.dim() == 1 or length + room > self.held.shape[3]:
            capacity = max(_FIRST_CAPACITY, 2 * (length + room))
            grown = new.new_empty(*new.shape[:3], capacity, new.shape[4])
            if self.length:
                grown[..., : self.length, :] = self.held[..., : self.length, :]
            self.held = grown
        self.held[..., self.length : length, :] = new
        self.length = length


class DFlashNetwork(ParallelNetwork):
    """Layers that draft max_depth tokens in one pass over a block of one token and max_depth masks."""

    rotation: Tensor

    def __init__(
        self, target: TargetFacts, vocabulary: DraftVocabulary, features: int, layers: int, depth: int
    ) -> None:
        super().__init__()
        size = target.hidden_size
        self.vocabulary, self.max_depth = vocabulary, depth
        self.project = nn.Linear(features * size, size, bias=False)
        self.context_norm = nn.RMSNorm(size, target.rms_norm_eps)
        self.mask = nn.Parameter(0.02 * torch.randn(size))
        self.layers = nn.ModuleList(DFlashLayer(target) for _ in range(layers))
        self.norm = nn.RMSNorm(size, target.rms_norm_eps)
        self.output = nn.Linear(size, len(vocabulary), bias=False)
        half = target.head_dim // 2
        frequencies = target.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(target.max_length + depth + 2, dtype=torch.float64)[:, None] * frequencies
        table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        self.register_buffer("rotation", table[:, None], persistent=False)

    def context(self, features: Tensor) -> Tensor:
        """What the layers see of the target's features (…, F * D): (…, D)."""
        seen: Tensor = self.context_norm(self.project(features))
        return seen

    def block(self, last: Tensor) -> Tensor:
        """Inputs (…, 1 + max_depth, D) of blocks that begin with the tokens `last` (…)."""
        masks = self.mask.to(self.dtype).expand(*last.shape, self.max_depth, -1)
        return torch.cat([self.embed(last)[..., None, :], masks], -2)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, R) of the outputs of the last layer (…, D) at masks."""
        logits: Tensor = self.output(self.norm(hidden))
        return logits

    def begin(self) -> _Context:
        """An empty context."""
        return _Context()

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Add to the contexts, and fill the block of each sequence: the drafts of all depths."""
        counts, width = [len(new) for new in features], 1 + self.max_depth
        seen = self.context(torch.cat(list(features)))
        starts = [state.length for state in states]
        places = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        rotation = self.rotation[places.to(seen.device)]
        new = torch.stack([layer.keys_values(seen, rotation) for layer in self.layers])  # type: ignore[operator]
        for state, part in zip(states, new.permute(0, 2, 3, 1, 4).split(counts, 3), strict=True):
            state.append(part, width)
        x = self.block(torch.stack([ids[-1] for ids in tokens]))  # (B, 1 + K, D)
        rotation = torch.stack([self.rotation[state.length : state.length + width] for state in states])
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DFlashLayer)
            normed = layer.norm(x)
            queries, own = layer.queries(normed, rotation), layer.keys_values(normed, rotation)
            attended = [
                self._attended(layer, queries[row], own[row], state.held[number], state.length)
                for row, state in enumerate(states)
            ]
            x = layer.mixed(x, torch.stack(attended))
        return self.all_depths(self.logits(x[:, 1:]))

    def _attended(self, layer: DFlashLayer, queries: Tensor, own: Tensor, held: Tensor, length: int) -> Tensor:
        """Attention (K, heads, D) of queries (K, heads, D) to the context held and to the block's own keys.

        own: (K, 2, H, D). held: (2, H, capacity, D).
        """
        width, groups = len(queries), layer.heads // layer.kv_heads
        total = length + width
        # The block's keys and values lie behind the context's until the next ones overwrite them.
        held[:, :, length:total] = own.permute(1, 2, 0, 3)
        keys, values = held[0, :, :total], held[1, :, :total]
        folded = queries.unflatten(1, (layer.kv_heads, groups)).permute(1, 2, 0, 3).flatten(1, 2)  # (H, G * K, D)
        attended = F.scaled_dot_product_attention(folded[None], keys[None], values[None])[0]
        return attended.unflatten(1, (groups, width)).permute(2, 0, 1, 3).flatten(1, 2)

    def blocks(self, batch: HeadBatch, anchors: Tensor) -> Tensor:
        """Outputs (B, A, max_depth, D) at the masks of blocks after the tokens at anchors (B, A), as read computes."""
        rows, count = anchors.shape
        width = 1 + self.max_depth
        seen = self.context(batch.features)
        x = self.block(batch.next_tokens().gather(1, anchors))  # (B, A, K, D)
        here = batch.positions.gather(1, anchors)
        offsets = torch.arange(1, 1 + width, device=anchors.device)
        rotation = self.rotation[(here[..., None] + offsets).flatten(1)]
        context_rotation = self.rotation[batch.positions]
        segment = batch.segments.gather(1, anchors)
        index = torch.arange(batch.tokens.shape[1], device=anchors.device)
        before = (index <= anchors[..., None]) & (batch.segments[:, None] == segment[..., None])  # (B, A, T)
        own_block = torch.eye(count, dtype=torch.bool, device=anchors.device).repeat_interleave(width, 1)
        allowed = torch.cat([before, own_block.expand(rows, -1, -1)], 2).repeat_interleave(width, 1)[:, None]
        x = x.flatten(1, 2)
        for layer in self.layers:
            assert isinstance(layer, DFlashLayer)
            normed = layer.norm(x)
            queries = layer.queries(normed, rotation).transpose(1, 2)
            of_context, of_block = layer.keys_values(seen, context_rotation), layer.keys_values(normed, rotation)
            keys, values = torch.cat([of_context, of_block], 1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, enable_gqa=True)
            x = layer.mixed(x, attended.transpose(1, 2))
        return x.unflatten(1, (count, width))[:, :, 1:]


@dataclass(frozen=True)
class DFlash(DraftHead):
    """Head of `layers` layers that drafts block - 1 tokens at once.

    features: number of the target's hidden states that it reads. anchors: blocks for each window in training, at random
    places. gamma: the loss of depth d is weighed by exp(-(d - 1) / gamma).
    """

    block: int = 8
    depth_layers: int = 2
    features: int = 3
    anchors: int = 64
    gamma: float = 4.0
    drafter: ClassVar[str] = "dflash"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("block", self.block >= 2, "2 or more"),
            ("depth_layers", self.depth_layers >= 1, "1 or more"),
            ("features", self.features >= 1, "1 or more"),
            ("anchors", self.anchors >= 1, "1 or more"),
            ("gamma", self.gamma > 0, "above 0"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """States that are evenly spread over the target's layers."""
        return spread_layers(target.layers, self.features)

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> DFlashNetwork:
        """The network; its layers begin at random."""
        return DFlashNetwork(target, vocabulary, len(self.layers(target)), self.depth_layers, self.block - 1)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """The output layer begins as the target's rows, and the mask as the mean of the embedding."""
        assert isinstance(network, DFlashNetwork)
        network.output.weight.data.copy_(weights.output[network.vocabulary.ids])
        network.mask.data.copy_(weights.embedding.mean(0))

    def training_passes(self, window: int) -> float:
        """All tokens as context, and the tokens of blocks."""
        return 1 + self.anchors * self.block / window

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """A block after every token."""
        assert isinstance(network, DFlashNetwork)
        rows, count = batch.tokens.shape
        anchors = torch.arange(count - 2, device=batch.tokens.device).expand(rows, -1)
        hidden = network.blocks(batch, anchors)
        return [network.logits(hidden[:, : count - 1 - d, d - 1]) for d in range(1, self.block)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of the weighted cross-entropy, in blocks at random places where there is one to predict."""
        assert isinstance(network, DFlashNetwork)
        depths = [batch.at_depth(depth) for depth in range(1, min(self.block, batch.tokens.shape[1] - 1))]
        useful = depths[0].valid
        count = min(self.anchors, useful.shape[1])
        # All places if they are no more than the anchors, else random ones among those that are useful.
        order = rand(useful.shape[0], useful.shape[1], useful.device) + useful
        anchors = order.topk(count, 1).indices.sort(1).values
        hidden = network.blocks(batch, anchors)
        total = DepthLoss(network.vocabulary, exp(-1 / self.gamma))
        for depth, targets in enumerate(depths, 1):
            chosen = _at(targets, anchors)
            total.add(depth, network.logits(hidden[:, :, depth - 1][chosen.valid]), chosen)
        return total.loss()


def _at(targets: DepthTargets, places: Tensor) -> DepthTargets:
    """The targets at places (B, A) of their windows; those beyond the end are not valid."""
    count = targets.valid.shape[1]
    inside = places.clamp(max=count - 1)
    wide = inside[..., None].expand(-1, -1, targets.top_ids.shape[-1])
    return DepthTargets(
        targets.labels.gather(1, inside),
        targets.top_ids.gather(1, wide),
        targets.top_log_probs.gather(1, wide),
        targets.valid.gather(1, inside) & (places < count),
    )
