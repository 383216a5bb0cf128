"""PPD: trained prompt tokens behind a token make the target itself predict the tokens after the next one.

Source: Chen et al. 2024, arXiv:2405.18628 (Parallel Prompt Decoding), and its code,
github.com/hmarkc/parallel-prompt-decoding: prompt tokens with their ensemble (EPT) and its mask, and distillation with
the decay 0.8 of depths.
Departs from it: a step trains prompt tokens behind many tokens of a window, where the paper inserts them at one random
place of each sequence; the target's distribution is that of its recorded most probable ids; prompt tokens begin as the
mean of the target's embedding with noise of its spread, where the paper begins with the embeddings of a text.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.decoding.targets.virtual import EmbeddedTokens
from hasten.accel.errors import check_fields
from hasten.accel.training.heads.draft_head import DraftNetwork, TargetFacts, TargetWeights
from hasten.accel.training.heads.virtual import VirtualHead, VirtualNetwork, WindowContext
from hasten.accel.training.heads.vocabulary import DraftVocabulary

# The parameter is the embedding divided by this, so that the learning rates of other heads suit: AdamW's steps are of
# the size of the rate, and embeddings have a long way to go. Measured on the embedded target after 100 steps: a rate of
# 0.03 for embeddings gives the loss 10.95, 0.01 gives 11.35, and 0.001 gives 13.91.
_UNIT = 32.0


class PromptTokens(VirtualNetwork):
    """Embeddings (m * e, D) of prompt tokens, which are the parameter `prompts` times a constant."""

    def __init__(self, vocabulary: int, positions: int, ensemble: int, size: int) -> None:
        super().__init__(vocabulary, positions, ensemble)
        self.prompts = nn.Parameter(torch.zeros(positions * ensemble, size))

    def virtual(self) -> EmbeddedTokens:
        """The prompt tokens."""
        return EmbeddedTokens(self.embeddings().detach())

    def embeddings(self) -> Tensor:
        """(m * e, D)."""
        return _UNIT * self.prompts

    def states(self, context: WindowContext, anchors: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """They run through all layers, over the windows' cache."""
        embedded = self.embeddings().repeat(anchors.shape[1], 1).expand(len(anchors), -1, -1)
        out = self.frozen.model.get_decoder()(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=context.cache,
            use_cache=True,
        )
        states: Tensor = out.last_hidden_state
        return states


@dataclass(frozen=True)
class ParallelPrompts(VirtualHead):
    """`depth` positions of prompt tokens, `ensemble` tokens at each."""

    depth: int = 3
    ensemble: int = 1
    drafter: ClassVar[str] = "ppd"

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("depth", self.depth >= 1, "1 or more"),
            ("ensemble", self.ensemble >= 1, "1 or more"),
            ("anchors", self.anchors >= 1, "1 or more"),
            ("decay", 0 < self.decay <= 1, "above 0 and at most 1"),
        )

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> PromptTokens:
        """Prompt tokens of zeros, which draft from all ids of the target, whatever the vocabulary."""
        return PromptTokens(target.vocabulary, self.depth, self.ensemble, target.hidden_size)

    def initialise(self, network: DraftNetwork, weights: TargetWeights) -> None:
        """Load the target; prompt tokens begin as the mean embedding with noise, so that those of a position differ."""
        super().initialise(network, weights)
        assert isinstance(network, PromptTokens)
        embedding = weights.embedding
        noise = torch.randn(network.prompts.shape) * embedding.std(0)
        network.prompts.data.copy_((embedding.mean(0) + noise) / _UNIT)
