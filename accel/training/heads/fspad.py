"""FSPAD: EAGLE-3-style head that mixes the token into the features, and aligns only what the next step reads.

Source: Gui et al. 2024, arXiv:2408.15562 (FSPAD), and its code, github.com/Luc4Gui/FSPAD.
Departs from it: it is built on EAGLE-3 (three layers of the target, training over several steps) instead of EAGLE-2;
alignment is with the fused hidden states of the next token, whose fusion is trained, so that both sides are normed
before they are compared and the fusion itself gets no gradient of it.

Feature sampling: a hidden state leaves open which token was drawn from it. Before the layer it is mixed with the
token's embedding, which gates it in the wider space of a feed-forward layer. Partial alignment distillation: the
layer's feed-forward part has two outputs, one of which makes the logits, while the other is carried to the next step,
and only this one is trained to be like the target's hidden state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.training.division import mean
from hasten.accel.training.heads.draft_head import DepthTargets, HeadBatch, TargetFacts
from hasten.accel.training.heads.eagle import Eagle, EagleNetwork, Step
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.by_depth import DepthLoss


class FeatureSampler(nn.Module):
    """x + down(SiLU(gate e) * up norm(x)) with x = linear(e, h), for an embedding e and a hidden state h."""

    def __init__(self, target: TargetFacts) -> None:
        super().__init__()
        size, wide = target.hidden_size, target.intermediate_size
        self.linear = nn.Linear(2 * size, size)
        self.norm = nn.RMSNorm(size, target.rms_norm_eps)
        self.gate = nn.Linear(size, wide, bias=False)
        self.up = nn.Linear(size, wide, bias=False)
        self.down = nn.Linear(wide, size, bias=False)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """(…, D) each to (…, D)."""
        x = self.linear(torch.cat([embedded, hidden], -1))
        mixed: Tensor = x + self.down(F.silu(self.gate(embedded)) * self.up(self.norm(x)))
        return mixed


class FspadNetwork(EagleNetwork):
    """EAGLE's network with a sampler before the layer and two outputs of its feed-forward part."""

    def __init__(
        self, target: TargetFacts, vocabulary: DraftVocabulary, depth: int, normed_residual: bool = False
    ) -> None:
        super().__init__(target, vocabulary, depth, normed_residual)
        self.sampler = FeatureSampler(target)
        self.mlp.down = nn.Linear(target.intermediate_size, 2 * target.hidden_size, bias=False)

    def enter(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the attention, and the residual, of the sampled feature."""
        return super().enter(embedded, self.sampler(embedded, hidden))

    def leave(self, residual: Tensor, attended: Tensor) -> Step:
        """What is said, and what is carried, differ from here on."""
        x = residual + attended
        said, carried = self.mlp(self.mlp_norm(x)).chunk(2, -1)
        return Step(x + said, x + carried)


@dataclass(frozen=True)
class Fspad(Eagle):
    """EAGLE's head with feature sampling and partial alignment; alignment is the weight of the latter's loss."""

    alignment: float = 1.0
    drafter: ClassVar[str] = "fspad"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alignment >= 0:
            raise UserError(f"alignment={self.alignment} is wrong: expected 0 or more")

    def build(self, target: TargetFacts, vocabulary: DraftVocabulary) -> FspadNetwork:
        """The network, with random weights."""
        return FspadNetwork(self.sizes(target), vocabulary, self.ttt_steps, self.normed_residual)

    def add_losses(
        self,
        total: DepthLoss,
        network: EagleNetwork,
        batch: HeadBatch,
        targets: DepthTargets,
        depth: int,
        step: Step,
    ) -> None:
        """Smooth L1 distance of what is carried from the fused hidden state of the next token."""
        valid, count = targets.valid, targets.valid.shape[1]
        with torch.no_grad():
            following = network.fuse(batch.features[:, depth : depth + count][valid].to(network.dtype))
        carried = step.carried
        size = carried.shape[-1:]
        distance = F.smooth_l1_loss(F.rms_norm(carried, size), F.rms_norm(following, size), reduction="sum")
        total.add_loss(depth, self.alignment * mean(distance, carried.numel()))
