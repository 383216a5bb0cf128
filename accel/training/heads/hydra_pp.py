"""Hydra++: Hydra's heads on the output of a decoder layer over the target's hidden states, so that they see the text.

Source: Ankner et al. 2024, arXiv:2402.05109, and its code, github.com/zankner/Hydra (`prefix-mlp`).
Departs from it as `hydra` does; besides, the layer begins as the identity, apart from its final norm. The layer runs
once for each committed token; drafts do not run it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.training.heads.attention import DecoderLayer, KeyValueCache, block_causal
from hasten.accel.training.heads.draft_head import HeadBatch, TargetFacts
from hasten.accel.training.heads.hydra import Hydra, HydraNetwork
from hasten.accel.training.heads.vocabulary import DraftVocabulary


class HydraPPNetwork(HydraNetwork):
    """Hydra's network behind a decoder layer with a final norm."""

    def __init__(
        self,
        target: TargetFacts,
        vocabulary: DraftVocabulary,
        depth: int,
        blocks: int,
        outputs: int,
        shares_blocks: bool,
    ) -> None:
        super().__init__(target.hidden_size, vocabulary, depth, blocks, outputs, shares_blocks)
        self.prefix = DecoderLayer(target)
        self.norm = nn.RMSNorm(target.hidden_size, target.rms_norm_eps)
        nn.init.zeros_(self.prefix.attention.out.weight)
        nn.init.zeros_(self.prefix.mlp.down.weight)

    def begin(self) -> KeyValueCache:
        """An empty cache."""
        return KeyValueCache()

    def encode(self, hidden: Tensor, batch: HeadBatch) -> Tensor:
        """The layer's outputs (B, T, D); a token sees its own document only."""
        encoded: Tensor = self.norm(self.prefix(hidden, batch.positions, block_causal(batch.segments)))
        return encoded

    def encode_last(self, states: Sequence[Any], features: Sequence[Tensor]) -> Tensor:
        """The layer over all new tokens, whose last ones alone go on behind its attention."""
        counts = [len(new) for new in features]
        hidden = features[0] if len(counts) == 1 else torch.cat(list(features))
        encoded: Tensor = self.norm(self.prefix.extend(states, hidden, counts))
        return encoded


@dataclass(frozen=True)
class HydraPP(Hydra):
    """Hydra's head behind a decoder layer over the text, with `blocks` blocks for each depth, four in the paper."""

    blocks: int = 4
    drafter: ClassVar[str] = "hydra_pp"

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> HydraPPNetwork:
        """The network; its layer begins as the identity with a norm."""
        return HydraPPNetwork(target, vocabulary, self.depth, self.blocks, self.outputs, self.shares_blocks)
