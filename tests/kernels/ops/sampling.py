"""Sampling with temperature, top-k and top-p."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.sampling import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned

# Rows' parameters: temperature, top_k, top_p.
GREEDY, PLAIN, K, P, BOTH = (0.0, 0, 1.0), (1.3, 0, 1.0), (0.7, 5, 1.0), (0.8, 0, 0.9), (1.0, 40, 0.8)
FLAT, ONE, ALL = (1e4, 0, 0.7), (1.0, 1, 0.5), (1e-12, 700, 0.3)
CASES = [
    (37, torch.float32, [GREEDY, PLAIN, K, P]),
    (173, torch.float32, [BOTH, FLAT, ALL]),
    (173, torch.float16, [BOTH, ONE]),
    (301, torch.bfloat16, [GREEDY, PLAIN, K, P, BOTH, FLAT]),
    (128_256, torch.bfloat16, [GREEDY, PLAIN, K, P, BOTH, FLAT]),
    (50_257, torch.float32, [GREEDY, PLAIN, K, P, BOTH, FLAT]),
]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for vocabulary, dtype, settings in CASES:
        if device != "cpu" or (vocabulary < 1000 and dtype != torch.bfloat16):
            yield f"{vocabulary} {dtype} {settings}", partial(check, vocabulary, dtype, settings, device)
    yield "equal logits", partial(check_ties, device)


def compilations() -> list[Compilation]:
    """Both outputs, with the dtypes of logits in use."""
    types = {"logits": "*bf16", "uniform": "*fp64", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32"}
    types |= {"scratch": "*i32", "tokens": "*i64", "probs": "constexpr", "vocabulary": "i32", "row_stride": "i32"}
    types |= {"scratch_stride": "i32", "EXACT": "constexpr", "BLOCK": "constexpr"}
    constants, options = {"probs": None, "EXACT": False, "BLOCK": 2048}, {"num_warps": 8}
    other = types | {"logits": "*fp32", "uniform": "*fp32", "tokens": "constexpr", "probs": "*fp32"}
    return [
        Compilation("tokens", triton_kernel.kernel, types, constants, options),
        Compilation(
            "probs",
            triton_kernel.kernel,
            other,
            {"tokens": None, "EXACT": True, "BLOCK": 2048},
            options,
            targets=("sm_90",),
        ),
    ]


def columns(settings: list[tuple[float, int, float]], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, top_k and top_p of each row."""
    heat, top_k, top_p = zip(*settings, strict=True)
    # Each in every second place: elements of an argument need not be adjacent.
    spread = (torch.tensor([[value, 1] for value in values], device=device)[:, 0] for values in (heat, top_k, top_p))
    return tuple(spread)  # type: ignore[return-value]


def check(vocabulary: int, dtype: torch.dtype, settings: list[tuple[float, int, float]], device: str) -> None:
    """AssertionError where the kernel's distribution or a token drawn from it is not the reference's."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(len(settings), 2 * vocabulary, generator=generator)
    logits[:, 7:vocabulary:5] = -torch.inf
    logits = logits.to(dtype)[:, :vocabulary].to(device)  # rows with a stride
    block = 2048 if device != "cpu" else 64
    uniform = torch.rand(len(settings), generator=generator, dtype=torch.float64).to(device)
    uniform = torch.stack([uniform, 1 - uniform], 1)[:, 0]
    parameters = columns(settings, device)
    for exact_k in (False, True):
        expected = reference.filtered_probs(logits, *parameters, exact_k)
        with poisoned():
            found = triton_kernel.filtered_probs(logits, *parameters, exact_k, block)
        # The last id of a nucleus may differ by rounding in float32 where the mass all but equals p.
        slack = 1e-6 if device == "cpu" else 3e-5
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=slack)
    with poisoned():
        tokens = triton_kernel.sample(logits, uniform, *parameters, exact_k, block)
    cumulative = expected.cumsum(-1)
    token = tokens[:, None]
    after, share = cumulative.gather(-1, token)[:, 0], found.gather(-1, token)[:, 0]
    assert bool((share > 0).all())
    assert bool((uniform < after + 1e-4).all() and (uniform > after - share - 1e-4).all())


def check_ties(device: str) -> None:
    """AssertionError where equal logits at a limit are not treated as documented."""
    logits = torch.tensor([[0.0, -0.0, 2.0, 0.0, -1.0, 0.0]] * 4, device=device)
    parameters = columns([(1.0, 3, 1.0), (0.0, 0, 1.0), (1.0, 0, 0.8), (1.0, 3, 0.7)], device)
    for exact_k, first in ((False, [0, 1, 2, 3, 5]), (True, [0, 1, 2])):
        probs = triton_kernel.filtered_probs(logits, *parameters, exact_k, 4)
        # exp(2) / (exp(2) + 4 + exp(-1)) = 0.628: the nucleus of 0.8 takes three of the four; of 0.7, with all ties
        # of top-k, 0.649 and one of them; with three ids exactly, 0.787 alone.
        kept = [first, [2], [0, 1, 2, 3], [2] if exact_k else [0, 2]]
        assert [row.nonzero()[:, 0].tolist() for row in probs] == kept
        torch.testing.assert_close(
            probs.double(), reference.filtered_probs(logits, *parameters, exact_k), rtol=1e-5, atol=0
        )
    # A point at the end of the distribution.
    uniform = torch.full((4,), 1.0 - 2**-53, dtype=torch.float64, device=device)
    assert triton_kernel.sample(logits, uniform, *parameters, False, 4).tolist() == [5, 2, 3, 2]
