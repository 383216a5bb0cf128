"""Sampling in plain torch, by a sort; see hasten.kernels.sampling."""

import torch
from torch import Tensor

# Range of temperatures: quotients of logits by them are finite.
LEAST, MOST = 1e-30, 1e30


def filtered_probs(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, exact_k: bool = False) -> Tensor:
    """Distribution (R, V) float64."""
    # Stable, so that equal logits are in the order of their ids.
    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    vocabulary = logits.shape[-1]
    temperature, top_k, top_p = temperature.double()[:, None], top_k.long()[:, None], top_p.double()[:, None]
    greedy = temperature <= 0
    rank = torch.arange(vocabulary, device=logits.device)
    count = torch.where(greedy, 1, torch.where(top_k > 0, top_k, vocabulary)).clamp(max=vocabulary)
    kept = rank < count
    if not exact_k:
        kept |= (ordered == ordered.gather(-1, count - 1)) & ~greedy
    scaled = (ordered - ordered[:, :1]) / temperature.clamp(LEAST, MOST)
    probs = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs * ((before < top_p) | (top_p >= 1) | (rank == 0))
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def sample(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, exact_k: bool = False
) -> Tensor:
    """Token ids (R,) int64."""
    cumulative = filtered_probs(logits, temperature, top_k, top_p, exact_k).cumsum(-1)
    point = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]
