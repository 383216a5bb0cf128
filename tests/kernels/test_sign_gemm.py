"""Weights of signs: the layout, and the two forms of two-binary quantization."""

import pytest
import torch

from hasten.kernels.sign_gemm import sign_gemm
from hasten.kernels.sign_gemm.layout import SignWeight, pack_signs, unpack_signs
from hasten.kernels.sign_gemm.reference import dequantize


def test_signs_come_back_from_their_words():
    positive = torch.randn(3, 2, 70, generator=torch.Generator().manual_seed(0)) > 0
    assert pack_signs(positive).shape == (3, 2, 3)
    assert torch.equal(unpack_signs(pack_signs(positive), 70), positive)


def test_zeros_and_ones_with_scales_2s_and_minus_s_are_a_grid_of_four_values():
    # DB-LLM starts from a 2-bit grid of step s: a1 = 2 s, a2 = -s.
    positive = torch.tensor([[[False, False, True, True], [True, False, True, False]]])
    weight = SignWeight(pack_signs(positive), torch.tensor([[[2.0], [-1.0]]]), 4, zero_one=True)
    assert dequantize(weight).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_the_low_rank_part_is_added():
    weight = SignWeight(
        pack_signs(torch.tensor([[[True, False]]])),
        torch.tensor([[[3.0]]]),
        2,
        left=torch.tensor([[2.0]]),
        right=torch.tensor([[1.0, 10.0]]),
    )
    assert sign_gemm(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weight).tolist() == [[5.0], [17.0]]


def test_groups_that_words_do_not_hold_are_refused():
    with pytest.raises(ValueError, match="2 groups of 70 columns: a group must have a multiple of 32 columns"):
        SignWeight(torch.zeros(3, 1, 3, dtype=torch.int32), torch.ones(3, 1, 2), 70)
    with pytest.raises(ValueError, match=r"must be int32 \(rows, planes, 3\), got torch\.int64"):
        SignWeight(torch.zeros(3, 1, 3).long(), torch.ones(3, 1, 1), 70)
