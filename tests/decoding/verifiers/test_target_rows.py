"""The target's most probable tokens, as verifiers read them."""

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows

TREE = DraftTree([4, 2], [ROOT, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equally_probable_tokens_the_first_is_the_best_one(dtype):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -1.0, -torch.inf, -3.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    rows = TargetRows(logits.to(dtype), TREE, Context([0], 1))
    assert [rows.best(node) for node in (ROOT, 0, 1)] == [1, 0, 4]


def test_a_penalty_changes_the_best_token():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]]).repeat(3, 1)
    rows = TargetRows(logits, TREE, Context([0, 1], 2, Sampling(repetition_penalty=10.0)))
    # 0 and 1 are in the context; behind both nodes 2 has been drafted, too.
    assert [rows.best(node) for node in (ROOT, 0, 1)] == [2, 2, 0]
