"""Cross-entropy with the target's recorded most probable tokens, over the vocabulary that the draft has."""

from torch import Tensor

from hasten.accel.training.heads.vocabulary import DraftVocabulary


def soft_cross_entropy(
    logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, vocabulary: DraftVocabulary, weight: Tensor
) -> Tensor:
    """Sum over rows of weight times the cross-entropy, whose gradient is that of the forward KL divergence.

    logits: (N, R) over the draft's vocabulary. top_ids, top_log_probs: (N, K), the target's most probable ids with
    their log probabilities among all ids. Ids that the draft lacks are left out and the rest is not scaled up: where
    the target would say something that the draft cannot, there is little to learn. weight: (N,).
    """
    rows = vocabulary.rows_of(top_ids)  # (N, K), -1 where the draft lacks the id
    probs = top_log_probs.float().exp().masked_fill(rows < 0, 0)
    log_probs = logits.float().log_softmax(-1).gather(-1, rows.clamp(min=0))
    return -(weight * (probs * log_probs).sum(-1)).sum()
