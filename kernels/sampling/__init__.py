"""Sampling of a token from logits with temperature, top-k and top-p, without a sort.

Temperature, top-k and top-p are applied in this order, as in transformers: top-k leaves all ids whose
logit is at least the k-th largest; top-p then leaves the smallest set whose probability, after top-k, reaches p. If
only some of several equal logits belong to that set, those with the lowest ids do.
"""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.sampling import reference

__all__ = ["filtered_probs", "sample"]


def sample(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, exact_k: bool = False
) -> Tensor:
    """Token ids (R,) int64 drawn from the filtered distribution of logits (R, V), by inverting its cumulative sum.

    uniform (R,): random numbers in [0, 1), of any float dtype. temperature (R,): 0 takes the most probable id, the
    lowest of several. top_k (R,) integers: 0 does not limit the number. top_p (R,): 1 does not limit the mass. exact_k:
    exactly top_k ids are left, of equal logits the lowest ids. Each row needs a finite logit; -inf excludes an id.
    """
    if use_triton(logits):
        from hasten.kernels.sampling import triton_kernel

        return triton_kernel.sample(logits, uniform, temperature, top_k, top_p, exact_k)
    return reference.sample(logits, uniform, temperature, top_k, top_p, exact_k)


def filtered_probs(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, exact_k: bool = False) -> Tensor:
    """The distribution (R, V) float32 that `sample` draws from; the arguments are those of `sample`."""
    if use_triton(logits):
        from hasten.kernels.sampling import triton_kernel

        return triton_kernel.filtered_probs(logits, temperature, top_k, top_p, exact_k)
    return reference.filtered_probs(logits, temperature, top_k, top_p, exact_k).float()
