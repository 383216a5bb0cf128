"""LUD: pads behind the last token predict the next tokens in parallel, trained on lexical units.

Source: Sun et al. 2024, arXiv:2405.15208 (Lexical Unit Decoding). There the target itself is fine-tuned: padding tokens
behind the context predict the tokens after the next one, and learn those that form a lexical unit, a span whose tokens
the model predicts with a probability above a threshold. Full text and code were not available: thresholds and numbers
are ours.
Departs from it: the target is frozen, and one decoder layer over its last hidden states does what the fine-tuned layers
do behind pads. A pad is a learned vector that is added to what the layer reads of the last token, because one layer
cannot fetch it in several steps. Tokens outside of units are learned, too, with a smaller weight, because without them
nothing keeps the confidence low where a unit has ended. The loss is the cross-entropy with the target's distribution.
With a reduced vocabulary a confidence is the probability among its tokens.

The drafts are verified by any verifier. Only `verifier=lexical_unit` accepts them as LUD does, by their confidence, and
then the output is not the target's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import check_fields
from hasten.accel.training.heads.attention import DecoderLayer, KeyValueCache, block_causal
from hasten.accel.training.heads.draft_head import (
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
from hasten.accel.training.heads.eagle import attend_unrolled
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss


class LudNetwork(ParallelNetwork):
    """A decoder layer over the tokens and max_depth - 1 pads behind the last one."""

    def __init__(self, target: TargetFacts, vocabulary: DraftVocabulary, depth: int) -> None:
        super().__init__()
        size, eps = target.hidden_size, target.rms_norm_eps
        self.vocabulary, self.max_depth = vocabulary, depth
        self.hidden_norm, self.embedding_norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.fuse = nn.Linear(2 * size, size, bias=False)
        self.pads = nn.Parameter(0.02 * torch.randn(depth - 1, size))
        self.layer = DecoderLayer(target)
        self.norm = nn.RMSNorm(size, eps)
        self.output = nn.Linear(size, len(vocabulary), bias=False)

    def enter(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Inputs (…, D) of the layer, of hidden states (…, D) and the tokens (…) that follow them."""
        both = torch.cat([self.hidden_norm(hidden.to(self.dtype)), self.embedding_norm(self.embed(tokens))], -1)
        x: Tensor = self.fuse(both)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(…, R) of outputs of the layer (…, D)."""
        logits: Tensor = self.output(self.norm(x))
        return logits

    def begin(self) -> KeyValueCache:
        """An empty cache."""
        return KeyValueCache()

    def read(self, states: Sequence[Any], features: Sequence[Tensor], tokens: Sequence[Tensor]) -> Frontier:
        """All depths at once: the layer over the new tokens and the pads, which leave the cache again."""
        x = self.enter(torch.cat(list(features)), torch.cat(list(tokens)))
        pads, counts = len(self.pads), [len(new) for new in tokens]
        rows = [torch.cat([part, part[-1] + self.pads]) for part in x.split(counts)]
        with_pads = [count + pads for count in counts]
        out = self.layer.extend(states, torch.cat(rows), with_pads, last_only=False)
        for state in states:
            state.length -= pads
        return self.all_depths(self.logits(torch.stack([part[-self.max_depth :] for part in out.split(with_pads)])))

    def unroll(self, batch: HeadBatch) -> list[Tensor]:
        """Outputs (B, T - 1 - d, D) of each depth d, with pads behind every token of the text."""
        count = batch.tokens.shape[1] - 2
        x = self.enter(batch.features[:, :count], batch.tokens[:, 1 : 1 + count])
        positions, mask = batch.positions[:, :count], block_causal(batch.segments[:, :count])
        attention = self.layer.attention
        outputs: list[Tensor] = []
        keys_values: list[Tensor] = []
        for depth in range(1, self.max_depth + 1):
            count = batch.tokens.shape[1] - 1 - depth
            row = x[:, :count] if depth == 1 else x[:, :count] + self.pads[depth - 2]
            queries, new = attention.project(self.layer.attention_norm(row), positions[:, :count] + depth - 1)
            keys_values = [*(before[:, :count] for before in keys_values), new]
            attended = attention.out(attend_unrolled(queries, keys_values[0], keys_values[1:], mask))
            outputs.append(self.layer.finish(row, attended))
        return outputs


@dataclass(frozen=True)
class Lud(DraftHead):
    """Head that drafts `depth` tokens in parallel.

    unit: target probability above which a token continues the lexical unit of the one before. outside: weight of
    tokens outside of the unit; 0 is the paper's. decay: weight of a depth's loss relative to that of the one before.
    """

    depth: int = 4
    unit: float = 0.5
    outside: float = 0.3
    decay: float = 0.8
    drafter: ClassVar[str] = "lud"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 2, "2 or more"),
            ("unit", 0 <= self.unit < 1, "0 or more and below 1"),
            ("outside", 0 <= self.outside <= 1, "from 0 to 1"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
        )

    def layers(self, target: TargetFacts) -> tuple[int, ...]:
        """The state that the target's output layer reads."""
        return (FINAL,)

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> LudNetwork:
        """The network, with random weights."""
        return LudNetwork(target, vocabulary, self.depth)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """The output layer begins as the target's rows of the draft's vocabulary."""
        assert isinstance(network, LudNetwork)
        network.output.weight.data.copy_(weights.output[network.vocabulary.ids])

    def training_passes(self, window: int) -> float:
        """The layer runs over all tokens for every depth."""
        return float(self.depth)

    def teacher_forced(self, network: DraftNetwork, batch: HeadBatch) -> list[Tensor]:
        """Every depth from the pads behind each token."""
        assert isinstance(network, LudNetwork)
        return [network.logits(x) for x in network.unroll(batch)]

    def loss(self, network: DraftNetwork, batch: HeadBatch) -> Loss:
        """Sum over depths of decay^(depth - 1) times the cross-entropy, in which tokens outside of units weigh less."""
        assert isinstance(network, LudNetwork)
        total = DepthLoss(network.vocabulary, self.decay)
        inside: Tensor | None = None
        for depth, x in enumerate(network.unroll(batch), 1):
            targets = batch.at_depth(depth)
            continued = self.continues(targets)
            inside = continued if inside is None else inside[:, : continued.shape[1]] & continued
            valid = targets.valid
            weight = torch.where(inside[valid], 1.0, self.outside)
            total.add(depth, network.logits(x[valid]), targets, weight)
        return total.loss()

    def continues(self, targets: DepthTargets) -> Tensor:
        """(B, T') bool: whether the text's token has a target probability above `unit` among the recorded ids."""
        probs = targets.top_log_probs.exp() * (targets.top_ids == targets.labels[..., None])
        return probs.sum(-1) > self.unit
