"""Reverse KL divergence: how little the target expects what the draft says; it makes a draft keep to a few modes.

Source: Gu et al. 2023, arXiv:2306.08543 (MiniLLM); for drafts, Zhou et al. 2023, arXiv:2310.08461 (DistillSpec).
Departs from them: only the target's K most probable ids are recorded, so that all other ids are one outcome; the result
is a lower bound of the divergence, by the data processing inequality. The text is the target's, not the draft's own.
"""

import torch
from torch import Tensor

from hasten.accel.training.heads.vocabulary import DraftVocabulary

# Recorded log probabilities are in float16, so that a smaller rest is rounding.
_LEAST_REST = 1e-4


def reverse_kl(
    logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, vocabulary: DraftVocabulary, weight: Tensor
) -> Tensor:
    """Sum over rows of weight times the sum over outcomes of q * (log q - log p), q the draft and p the target.

    logits: (N, R) over the draft's vocabulary. top_ids, top_log_probs: (N, K); -inf for an id that was not recorded.
    The outcomes are the recorded ids that the draft has, and the rest. weight: (N,).
    """
    rows = vocabulary.rows_of(top_ids)
    known = (rows >= 0) & top_log_probs.isfinite()
    target_log = top_log_probs.float().masked_fill(~known, 0.0)
    draft_log = logits.float().log_softmax(-1).gather(-1, rows.clamp(min=0)).masked_fill(~known, 0.0)
    draft_probs = draft_log.exp() * known
    target_rest = (1 - (target_log.exp() * known).sum(-1)).clamp(_LEAST_REST, 1.0)
    draft_rest = (1 - draft_probs.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
    among = (draft_probs * (draft_log - target_log)).sum(-1)
    return (weight * (among + draft_rest * (draft_rest.log() - target_rest.log()))).sum()
