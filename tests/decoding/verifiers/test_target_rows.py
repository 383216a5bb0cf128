"""The target's most probable tokens, as verifiers read them."""

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, best_of_all

TREE = DraftTree([4, 2], [ROOT, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equally_probable_tokens_the_first_is_the_best_one(dtype):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -1.0, -torch.inf, -3.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    rows = TargetRows(logits.to(dtype), TREE, Context([0], 1))
    assert [rows.best(node) for node in (ROOT, 0, 1)] == [1, 0, 4]


def test_known_tokens_are_not_computed_again_unless_there_is_a_penalty():
    logits = torch.eye(3, 5)
    for penalty, expected in ((1.0, [4, 3, 2]), (1e-3, [0, 1, 2])):
        context = Context([0], 1, Sampling(repetition_penalty=penalty))
        rows = TargetRows(logits, TREE, context, [4, 3, 2])
        assert [rows.best(node) for node in (ROOT, 0, 1)] == expected


@pytest.mark.parametrize(("sampling", "greedy"), [(Sampling(), True), (Sampling(temperature=1.0), False)])
def test_tokens_of_all_sequences_are_read_from_a_device_at_once(sampling, greedy):
    class OnDevice(torch.Tensor):
        """A tensor that says that it is on a GPU."""

        device = torch.device("cuda")

    logits = torch.eye(6, 7).view(2, 3, 7)
    contexts = [Context([0], 1, Sampling(temperature=1.0)), Context([0], 1, sampling)]
    assert best_of_all(logits.as_subclass(OnDevice), contexts) == ([[0, 1, 2], [3, 4, 5]] if greedy else None)
    assert best_of_all(logits, contexts) is None


def test_a_penalty_changes_the_best_token():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]]).repeat(3, 1)
    rows = TargetRows(logits, TREE, Context([0, 1], 2, Sampling(repetition_penalty=10.0)))
    # 0 and 1 are in the context; behind both nodes 2 has been drafted, too.
    assert [rows.best(node) for node in (ROOT, 0, 1)] == [2, 2, 0]
