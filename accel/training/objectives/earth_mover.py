"""EMO: an upper bound of the earth mover distance, where to move probability between like tokens costs little.

Source: Ren et al. 2023, arXiv:2310.04691 (EMO), and its code, github.com/DRSY/EMO. With the cost 1 - cos(e_i, e_j) of
moving from token i to j, the bound is that of moving every share in proportion: the sum of p_i q_j times their cost,
which is 1 - p E · q E for embeddings E of unit length. As there, the loss is half cross-entropy and half this bound,
scaled in every row to the size of the cross-entropy.
Departs from it: p is the target's recorded distribution, not the text's one-hot; the embeddings are the target's.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from hasten.accel.training.heads.vocabulary import DraftVocabulary

_LEAST = 1e-6


@dataclass(frozen=True, eq=False)
class EarthMover:
    """The objective. directions: (R, D) embeddings of unit length of the draft's vocabulary."""

    directions: Tensor

    @classmethod
    def of(cls, embedding: Tensor) -> "EarthMover":
        """With embeddings (R, D) of any length."""
        return cls(F.normalize(embedding.detach().float(), dim=-1))

    def bound(self, logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, vocabulary: DraftVocabulary) -> Tensor:
        """The bound (N,), from 0 to 2, between the draft and the recorded ids that it has, which are scaled to 1."""
        rows = vocabulary.rows_of(top_ids)
        probs = top_log_probs.float().exp().masked_fill(rows < 0, 0)
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=_LEAST)
        target = F.embedding_bag(rows.clamp(min=0), self.directions, per_sample_weights=probs, mode="sum")
        draft = logits.float().softmax(-1) @ self.directions
        return 1 - (target * draft).sum(-1)

    def __call__(
        self, logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, vocabulary: DraftVocabulary, weight: Tensor
    ) -> Tensor:
        """Sum over rows of weight times the loss; arguments as of `soft_cross_entropy`."""
        rows = vocabulary.rows_of(top_ids)
        probs = top_log_probs.float().exp().masked_fill(rows < 0, 0)
        cross_entropy = -(probs * logits.float().log_softmax(-1).gather(-1, rows.clamp(min=0))).sum(-1)
        bound = self.bound(logits, top_ids, top_log_probs, vocabulary)
        scale = (cross_entropy / bound.clamp(min=_LEAST)).detach()
        return (weight * (cross_entropy + scale * bound)).sum() / 2
