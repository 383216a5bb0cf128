"""Clover: a recurrent head that takes each drafted token into its state, after extra layers over the context.

Source: Xiao et al. 2024, arXiv:2405.00263 (Clover) and arXiv:2408.00264 (Clover-2), and the latter's code,
github.com/XiaoBin1992/clover, which this follows: order of the parts, initial weights, losses and their weights.
Departs from it: the target's state is read behind its final norm; the embedding is the target's own, where the code
takes its output layer's rows; the output layer drafts from a reduced vocabulary and is trained; the noise on initial
weights is symmetric; no row is masked because the text's token is one that the target would hardly say.

Regressive connection and Attention Decoder: the state is updated with the embedding of the latest token before every
draft, in each head by its value times the cosine of the state's query and the token's key. The first update is at every
token of the context, with weights of its own; the Augmenting Block, decoder layers that begin as copies of the target's
last one, runs over these states once per pass of the target. Later updates share weights, from depth to depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import UserError, check_fields
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.training.division import mean
from hasten.accel.training.heads.attention import DecoderLayer, KeyValueCache, block_causal
from hasten.accel.training.heads.draft_head import (
    DraftHead,
    DraftNetwork,
    Frontier,
    HeadBatch,
    Loss,
    TargetFacts,
    TargetWeights,
)
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss

_NOISE = 0.01
# Parts of a `DecoderLayer`, with the tensors of a Llama layer that are stacked to make each.
_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


class AttentionDecoder(nn.Module):
    """h + value(e) * cos(query(norm(h)), key(e)) by head, for a state h and the embedding e of a token."""

    def __init__(self, target: TargetFacts) -> None:
        super().__init__()
        size = target.hidden_size
        self._heads = target.heads
        self.norm = nn.RMSNorm(size, target.rms_norm_eps)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        for linear, begins_as_identity in ((self.query, True), (self.key, True), (self.value, False)):
            _near_identity(linear, begins_as_identity)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """(…, D) each to (…, D)."""
        by_head = (self._heads, -1)
        query, key = self.query(self.norm(hidden)).unflatten(-1, by_head), self.key(embedded).unflatten(-1, by_head)
        weight = F.cosine_similarity(query, key, dim=-1)[..., None]
        updated: Tensor = hidden + (self.value(embedded).unflatten(-1, by_head) * weight).flatten(-2)
        return updated


def _near_identity(linear: nn.Linear, identity: bool = True) -> None:
    """Set the weights to a little noise, added to the identity on the first inputs, and the bias to zeros."""
    nn.init.uniform_(linear.weight, -_NOISE, _NOISE)
    nn.init.zeros_(linear.bias)
    if identity:
        linear.weight.data.diagonal().add_(1)


class CloverNetwork(DraftNetwork):
    """Attention Decoders for the first depth and for the others, the block between them, and one output layer."""

    def __init__(self, target: TargetFacts, vocabulary: DraftVocabulary, depth: int, blocks: int) -> None:
        super().__init__()
        size, eps = target.hidden_size, target.rms_norm_eps
        self.vocabulary, self.max_depth = vocabulary, depth
        self.first, self.later = AttentionDecoder(target), AttentionDecoder(target)
        self.blocks = nn.ModuleList(DecoderLayer(target) for _ in range(blocks))
        self.block_norm, self.norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.first_projection, self.later_projection = nn.Linear(size, size), nn.Linear(2 * size, size)
        for linear in (self.first_projection, self.later_projection):
            _near_identity(linear)
        self.output = nn.Linear(size, len(vocabulary), bias=False)

    def drafted(self, hidden: Tensor, embedded: Tensor | None = None) -> Tensor:
        """What the output layer reads, (…, D), of states (…, D) and, from depth 2 on, of the latest token."""
        if embedded is None:
            x = self.first_projection(hidden)
        else:
            x = self.later_projection(torch.cat([hidden, embedded], -1))
        normed: Tensor = self.norm(x)
        return normed

    def begin(self) -> list[KeyValueCache]:
        """An empty cache for each layer of the block."""
        return [KeyValueCache() for _ in self.blocks]

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """Update and block over all new tokens; the first draft from the last one of each sequence."""
        counts = [len(new) for new in tokens]
        x = self.first(torch.cat(list(features)), self.embed(torch.cat(list(tokens))))
        for number, block in enumerate(self.blocks):
            assert isinstance(block, DecoderLayer)
            last = number == len(self.blocks) - 1
            x = block.extend([state[number] for state in states], x, counts, last_only=last)
        hidden = self.block_norm(x)
        sequence = torch.arange(len(counts), device=hidden.device)
        return Frontier(self.output(self.drafted(hidden)), sequence, 1, hidden)

    def step(self, states: Sequence[Any], frontier: Frontier, rows: Tensor, tokens: Tensor) -> Frontier:
        """The parent's state, updated with the token."""
        embedded = self.embed(tokens)
        hidden = self.later(frontier.carried[rows], embedded)
        logits = self.output(self.drafted(hidden, embedded))
        return Frontier(logits, frontier.sequence[rows], frontier.depth + 1, hidden)

    def unroll(self, batch: HeadBatch) -> Iterator[Tensor]:
        """What the output layer reads at each depth d, (B, T - 1 - d, D), along the text."""
        count = batch.tokens.shape[1] - 2
        hidden = self.first(batch.features[:, :count].to(self.dtype), self.embed(batch.tokens[:, 1 : 1 + count]))
        mask = block_causal(batch.segments[:, :count])
        for block in self.blocks:
            hidden = block(hidden, batch.positions[:, :count], mask)
        hidden = self.block_norm(hidden)
        yield self.drafted(hidden)
        for depth in range(2, self.max_depth + 1):
            count = batch.tokens.shape[1] - 1 - depth
            embedded = self.embed(batch.tokens[:, depth : depth + count])
            hidden = self.later(hidden[:, :count], embedded)
            yield self.drafted(hidden, embedded)


@dataclass(frozen=True)
class Clover(DraftHead):
    """Head with `depth` drafts and an Augmenting Block of `blocks` layers.

    decay: weight of a depth's loss relative to that of the one before. alignment: weight of the smooth L1 distance of
    what the output layer reads from the target's own state at the drafted token.
    """

    depth: int = 5
    blocks: int = 2
    decay: float = 0.7
    alignment: float = 10.0
    drafter: ClassVar[str] = "clover"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("blocks", self.blocks >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
            ("alignment", self.alignment >= 0, "0 or more"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """The state that the target's output layer reads."""
        return (FINAL,)

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> CloverNetwork:
        """The network; its linear layers begin near the identity. UserError if the heads do not divide the width."""
        if target.hidden_size % target.heads:
            raise UserError(
                f"head=clover needs a target whose hidden_size={target.hidden_size} is a multiple of its "
                f"{target.heads} attention heads: use head=eagle"
            )
        return CloverNetwork(target, vocabulary, self.depth, self.blocks)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """The output layer begins as the target's rows, the block and the norms as the target's last layer and norm.

        Of a checkpoint without Llama's names, the block keeps its random weights.
        """
        assert isinstance(network, CloverNetwork)
        network.output.weight.data.copy_(weights.output[network.vocabulary.ids])
        if weights.folder is None:
            return
        tensors = _last_layer(Checkpoint(weights.folder))
        for block in network.blocks if tensors else ():
            block.load_state_dict(tensors)
        norm = _final_norm(Checkpoint(weights.folder))
        if norm is not None:
            for layer in (network.block_norm, network.norm):
                layer.weight.data.copy_(norm)

    def training_passes(self, window: int) -> float:
        """The blocks run once; what is smaller, the update and the output layer, for every depth."""
        return 1.0 + 0.5 * (self.depth - 1)

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Logits of every depth along the text."""
        assert isinstance(network, CloverNetwork)
        return [network.output(said) for said in network.unroll(batch)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy and the distance of the states."""
        assert isinstance(network, CloverNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        for depth, said in enumerate(network.unroll(batch), 1):
            targets = batch.at_depth(depth)
            valid, count = targets.valid, targets.valid.shape[1]
            said = said[valid]
            total.add(depth, network.output(said), targets)
            following = batch.features[:, depth : depth + count][valid]
            distance = F.smooth_l1_loss(said.float(), following.float(), reduction="sum")
            total.add_loss(depth, self.alignment * mean(distance, said.numel()))
        return total.loss()


def _last_layer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights of a checkpoint's last layer by their names in a `DecoderLayer`; none without Llama's names."""
    query = "self_attn.q_proj.weight"
    layers = [name.removesuffix(query) for name in checkpoint.names if name.endswith(query)]
    if not layers:
        return {}
    prefix = max(layers, key=lambda name: int(name.split(".")[-2]))
    parts = {own: [f"{prefix}{name}.weight" for name in names] for own, names in _LAYER.items()}
    if not all(name in checkpoint for names in parts.values() for name in names):
        return {}
    return {
        f"{own}.weight": torch.cat([checkpoint.tensor(name, torch.float32) for name in names])
        for own, names in parts.items()
    }


def _final_norm(checkpoint: Checkpoint) -> Tensor | None:
    """Weight of a checkpoint's final norm; None without Llama's name."""
    name = next((name for name in checkpoint.names if name.endswith("model.norm.weight")), None)
    return None if name is None else checkpoint.tensor(name, torch.float32)
