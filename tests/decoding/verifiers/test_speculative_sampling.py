import math

import pytest
import torch

from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.rejection import distribution, recovered
from hasten.accel.decoding.verifiers.speculative_sampling import SpeculativeSampling
from tests.decoding.verifiers.drafts import DRAFT, KINDS, TARGET, V, rows

SAMPLED = Sampling(temperature=1.0)
P, Q = distribution(TARGET[0]), distribution(DRAFT[0])


def verify(tree, seed):
    return SpeculativeSampling().verify(tree, rows(tree, SAMPLED), torch.Generator().manual_seed(seed))


def chain(token, probs=None):
    return DraftTree.chain([token], None if probs is None else [probs])


def test_a_draw_is_kept_as_often_as_the_two_distributions_overlap():
    # By hand: min(.35, .5) + min(.3, .1) + min(.2, .25) + min(.15, 0) + min(0, .15)
    overlap, count = 0.35 + 0.10 + 0.20, 3000
    generator = torch.Generator().manual_seed(1)
    kept = sum(
        bool(SpeculativeSampling().verify(tree, rows(tree, SAMPLED), generator).path)
        for tree in KINDS["drawn chain"].trees(count)
    )
    # Five standard deviations of a binomial.
    assert abs(kept - count * overlap) < 5 * math.sqrt(count * overlap * (1 - overlap))


def test_the_recovered_token_is_one_that_the_target_has_more_of():
    # By hand: p - q is (-.15, .2, -.05, .15, -.15).
    assert recovered(P, Q) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=1e-7)  # the tables are float32
    rejected = [verdict.token for seed in range(300) if not (verdict := verify(chain(0, DRAFT[0]), seed)).path]
    assert set(rejected) == {1, 3}


def test_a_token_that_was_not_drawn_is_kept_with_its_own_probability_and_not_recovered():
    verdicts = [verify(chain(1), seed) for seed in range(1000)]
    rejected = [verdict.token for verdict in verdicts if not verdict.path]
    assert abs(len(rejected) - 700) < 5 * math.sqrt(1000 * 0.3 * 0.7)
    assert set(rejected) == {0, 2, 3}


def test_a_draft_like_the_target_is_always_kept():
    # The draft's logits differ by a constant, so that its softmax rounds another way.
    for token in range(V - 1):
        assert all(verify(chain(token, (TARGET[0].log() + 7.3).softmax(-1)), seed).path for seed in range(50))


def test_nothing_left_but_rounding_is_recovered_from_the_target():
    assert recovered(P, P).tolist() == P.tolist()
