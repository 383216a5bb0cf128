"""Sampling without a sort: its distribution is that of decoding's sampling parameters."""

import pytest
import torch

from hasten.accel.decoding.sampling import Sampling
from hasten.kernels.sampling import filtered_probs, sample

SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=3),
    Sampling(1e-9, top_k=200),
    Sampling(1.3, top_p=0.6),
    Sampling(0.8, top_k=20, top_p=0.95),
    Sampling(1.0, top_k=50, top_p=0.01),
]


def parameters(settings):
    return (
        torch.tensor([setting.temperature for setting in settings]),
        torch.tensor([setting.top_k for setting in settings]),
        torch.tensor([setting.top_p for setting in settings]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_distribution_is_that_of_the_sampling_parameters(dtype):
    logits = 3 * torch.randn(len(SETTINGS), 100, generator=torch.Generator().manual_seed(0))
    # Distinct numbers also in bfloat16: of equal ones at the edge of a nucleus, the two leave different ids.
    logits = logits.round(decimals=1).to(dtype) if dtype == torch.float32 else logits.argsort(-1).to(dtype) / 8
    found = filtered_probs(logits, *parameters(SETTINGS))
    for row, setting in enumerate(SETTINGS):
        expected = setting.probs(logits[row])
        torch.testing.assert_close(found[row].sort().values, expected.sort().values, rtol=1e-5, atol=1e-7)
        if dtype == torch.bfloat16:
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-7)


def test_equally_spaced_points_draw_each_id_in_proportion_to_its_probability():
    probs = torch.tensor([0.5, 0.0, 0.25, 0.25])
    points = (torch.arange(64) + 0.5) / 64
    settings = parameters([Sampling(1.0)] * 64)
    tokens = sample(probs.log().expand(64, 4), points, *settings)
    assert tokens.bincount(minlength=4).tolist() == [32, 0, 16, 16]
    # The nucleus of 0.7 is {0, 2}: of equal logits the lower id.
    settings = parameters([Sampling(1.0, top_p=0.7)] * 64)
    assert set(sample(probs.log().expand(64, 4), points, *settings).tolist()) == {0, 2}
