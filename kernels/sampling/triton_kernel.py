"""Sampling as a Triton kernel. It is imported only on first use, because importing triton takes seconds.

One program handles one row. Logits are compared as integer keys of the same order, so that the k-th largest logit and
the last one of the nucleus are found exactly, by bisection over the key. A row of a large vocabulary would be read 32
times for each. So a first pass keeps the maximum of each lane, that is of every BLOCK-th logit: at least k logits are
not below the k-th largest of these maxima, and the mass of the maxima bounds the nucleus in the same way. Only the
logits above that bound, which are few, are copied to a scratch buffer, and bisected there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.sampling.reference import LEAST, MOST

_BLOCK, _WARPS = 2048, 8
_LEAST, _MOST = tl.constexpr(LEAST), tl.constexpr(MOST)
_LOG2E = tl.constexpr(1.4426950408889634)
# Smallest finite maximum of a lane: differences of -inf would be NaN.
_FLOOR = tl.constexpr(-3.0e38)
_LOWEST_KEY = tl.constexpr(-(2**31))
# Binary exponents of the probabilities, relative to the largest, at which the nucleus is sought in a flat distribution.
_NEAR, _FAR = tl.constexpr(12.0), tl.constexpr(24.0)
# The bound of the nucleus must hold in spite of rounding in another order of summation.
_MARGIN = tl.constexpr(1.0 + 1e-5)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    exact_k: bool = False,
    block: int = _BLOCK,
) -> Tensor:
    """Token ids (R,) int64; see hasten.kernels.sampling.sample."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _launch(logits, uniform, temperature, top_k, top_p, tokens, None, exact_k, block)
    return tokens


def filtered_probs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, exact_k: bool = False, block: int = _BLOCK
) -> Tensor:
    """Distribution (R, V) float32; see hasten.kernels.sampling.filtered_probs."""
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch(logits, temperature, temperature, top_k, top_p, None, probs, exact_k, block)
    return probs


def _launch(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    tokens: Tensor | None,
    probs: Tensor | None,
    exact_k: bool,
    block: int,
) -> None:
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    scratch = torch.empty(rows, triton.cdiv(vocabulary, block) * block, dtype=torch.int32, device=logits.device)
    kernel[(rows,)](
        logits,
        uniform.contiguous(),
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        scratch,
        tokens,
        probs,
        vocabulary,
        logits.stride(0),
        scratch.stride(0),
        exact_k,
        block,
        num_warps=_WARPS,
    )


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """int32 that are ordered as the float32 numbers x."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(key, best, slope):  # type: ignore[no-untyped-def]
    """Probability relative to that of the largest logit."""
    return tl.exp2((_value(key) - best) * slope)


@triton.jit
def _count(scratch, filled, depth, low, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Number of candidates whose key is at least low."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for step in range(0, depth):
        key = tl.load(scratch + step * BLOCK + lane, mask=step < filled, other=_LOWEST_KEY)
        count += ((key >= low) & (step < filled)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _mass(scratch, filled, depth, low, best, slope, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Sum of the weights of the candidates whose key is at least low."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for step in range(0, depth):
        key = tl.load(scratch + step * BLOCK + lane, mask=step < filled, other=_LOWEST_KEY)
        mass += tl.where((key >= low) & (step < filled), _weight(key, best, slope), 0.0)
    return tl.sum(mass)


@triton.jit
def _lane_bound(maxima, k, need, best, slope):  # type: ignore[no-untyped-def]
    """Key that at least k logits reach; if k is 0, key above which the mass is at least `need`.

    It is the lowest key if the maxima of the lanes do not tell.
    """
    keys = _key(maxima)
    # Maxima at the floor stand for lanes without a finite logit.
    low = _key(best).to(tl.int64) * 0 + _key(tl.full((), _FLOOR, tl.float32))
    high = _key(best).to(tl.int64) + 1
    found = low < low
    while high - low > 1:
        middle = (low + high) >> 1
        over = keys >= middle.to(tl.int32)
        if k > 0:
            enough = tl.sum(over.to(tl.int32)) >= k
        else:
            enough = tl.sum(tl.where(over, tl.exp2((maxima - best) * slope), 0.0)) >= need
        found = found | enough
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return tl.where(found, low, low * 0 + _LOWEST_KEY).to(tl.int32)


@triton.jit
def _flat_bound(logits, vocabulary, need, best, slope, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The higher of two keys above which the mass is at least `need`; the lowest key if neither is."""
    near, far = _key(best - _NEAR / slope), _key(best - _FAR / slope)
    near_mass = tl.zeros([BLOCK], tl.float32)
    far_mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        weight = tl.exp2((x - best) * slope)
        near_mass += tl.where(_key(x) >= near, weight, 0.0)
        far_mass += tl.where(_key(x) >= far, weight, 0.0)
    bound = tl.where(tl.sum(far_mass) >= need, far, _LOWEST_KEY)
    return tl.where(tl.sum(near_mass) >= need, near, bound)


@triton.jit
def _last_tie(logits, vocabulary, cut, ties, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Id of the logit that is the ties-th of those whose key is cut."""
    last = vocabulary * 1
    before = vocabulary * 0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        equal = ((_key(x) == cut) & inside).to(tl.int32)
        count = tl.sum(equal)
        if (before < ties) & (before + count >= ties):
            rank = before + tl.cumsum(equal, 0)
            last = tl.min(tl.where((rank == ties) & (equal > 0), column, vocabulary))
        before += count
    return last


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    logits,
    uniform,
    temperature,
    top_k,
    top_p,
    scratch,
    tokens,
    probs,
    vocabulary,
    row_stride,
    scratch_stride,
    EXACT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program handles one row; the columns of logits are contiguous. Either tokens or probs is None."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    scratch += row * scratch_stride
    lane = tl.arange(0, BLOCK)
    heat = tl.load(temperature + row).to(tl.float32)
    greedy = heat <= 0
    slope = _LOG2E / tl.minimum(tl.maximum(heat, _LEAST), _MOST)
    k = tl.where(greedy, 1, tl.load(top_k + row).to(tl.int32))
    p = tl.load(top_p + row).to(tl.float32)
    limits_count = (k > 0) & (k < vocabulary)
    limits_mass = (p < 1.0) & (heat > 0)
    # Maximum of each lane, and the sum of weights relative to it.
    maxima = tl.full([BLOCK], _FLOOR, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < vocabulary, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maxima, x)
        sums = sums * tl.exp2((maxima - larger) * slope) + tl.exp2((x - larger) * slope)
        maxima = larger
    best = tl.max(maxima)
    total = tl.sum(sums * tl.exp2((maxima - best) * slope))
    # Kept are keys above cut, and of those that equal cut the ones with an id of at most `last`.
    cut = tl.full((), _LOWEST_KEY, tl.int32)
    last = vocabulary * 1
    if limits_count | limits_mass:
        wanted = tl.where(limits_count, k, 0)
        bound = _lane_bound(maxima, wanted, p * total * _MARGIN, best, slope)
        if (bound == _LOWEST_KEY) & (wanted == 0):
            bound = _flat_bound(logits, vocabulary, p * total * _MARGIN, best, slope, BLOCK)
        # Each lane has a column of the scratch buffer, so that nothing has to be counted across lanes.
        filled = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + lane < vocabulary
            key = _key(tl.load(logits + start + lane, mask=inside, other=float("-inf")).to(tl.float32))
            chosen = inside & (key >= bound)
            tl.store(scratch + filled * BLOCK + lane, key, mask=chosen)
            filled += chosen.to(tl.int32)
        tl.debug_barrier()
        depth = tl.max(filled)
        ties = vocabulary * 1
        cut = bound
        if limits_count:
            low, high = bound.to(tl.int64), _key(best).to(tl.int64) + 1
            reached = _count(scratch, filled, depth, bound, BLOCK)
            # Exactly k reach most thresholds between the k-th logit and the next: one of them is soon met.
            while (high - low > 1) & (reached != k):
                middle = (low + high) >> 1
                count = _count(scratch, filled, depth, middle.to(tl.int32), BLOCK)
                low = tl.where(count >= k, middle, low)
                high = tl.where(count >= k, high, middle)
                reached = tl.where(count >= k, count, reached)
            cut = low.to(tl.int32)
            above = _count(scratch, filled, depth, cut + 1, BLOCK)
            ties = k - above
            if not EXACT:
                ties = tl.where(greedy, ties, _count(scratch, filled, depth, cut, BLOCK) - above)
            total = _mass(scratch, filled, depth, cut + 1, best, slope, BLOCK) + ties * _weight(cut, best, slope)
        if limits_mass:
            need = p * total
            low, high = cut.to(tl.int64), _key(best).to(tl.int64) + 1
            while high - low > 1:
                middle = (low + high) >> 1
                enough = _mass(scratch, filled, depth, middle.to(tl.int32), best, slope, BLOCK) >= need
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            ties = tl.where(low == cut.to(tl.int64), ties, vocabulary)
            cut = low.to(tl.int32)
            above_mass = _mass(scratch, filled, depth, cut + 1, best, slope, BLOCK)
            weight = _weight(cut, best, slope)
            # Compared as floats, because the quotient may exceed an int32.
            rounded_up = tl.ceil((need - above_mass) / tl.maximum(weight, 1e-38))
            ties = tl.maximum(1, tl.minimum(rounded_up, ties.to(tl.float32)).to(tl.int32))
        equal = _count(scratch, filled, depth, cut, BLOCK) - _count(scratch, filled, depth, cut + 1, BLOCK)
        ties = tl.minimum(ties, equal)
        if limits_mass:
            total = _mass(scratch, filled, depth, cut + 1, best, slope, BLOCK) + ties * _weight(cut, best, slope)
        if ties < equal:
            last = _last_tie(logits, vocabulary, cut, ties, BLOCK)
    if probs is not None:
        for start in range(0, vocabulary, BLOCK):
            column = start + lane
            x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            key = _key(x)
            kept = (key > cut) | ((key == cut) & (column <= last))
            share = tl.where(kept, tl.exp2((x - best) * slope) / total, 0.0)
            tl.store(probs + row * vocabulary + column, share, mask=column < vocabulary)
    if tokens is not None:
        # float64: in float32 a sum over a large vocabulary is off by more than a rare token's share.
        point = tl.load(uniform + row).to(tl.float64) * total.to(tl.float64)
        carry = total.to(tl.float64) * 0
        token = tl.full((), -1, tl.int32)
        # Where rounding leaves the point above the sum of all, the last id of positive weight is taken.
        final = tl.full((), 0, tl.int32)
        for start in range(0, vocabulary, BLOCK):
            column = start + lane
            x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            key = _key(x)
            kept = (key > cut) | ((key == cut) & (column <= last))
            weight = tl.where(kept, tl.exp2((x - best) * slope), 0.0).to(tl.float64)
            mass = tl.sum(weight)
            final = tl.maximum(final, tl.max(tl.where(weight > 0, column, 0)))
            if (token < 0) & (carry + mass > point):
                running = carry + tl.cumsum(weight, 0)
                candidate = tl.min(tl.where((running > point) & (weight > 0), column, vocabulary))
                token = tl.where(candidate < vocabulary, candidate, token)
            carry += mass
        tl.store(tokens + row, tl.where(token < 0, final, token).to(tl.int64))
