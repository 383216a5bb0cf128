"""ActQKV: what weighs in a probe, by which keys a block is known, and how layers share a budget."""

import pytest
import torch

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.retrieve.actqkv import ActQKV, activation_bias, density, shared_out
from hasten.kernels.attention.contract import PLAIN

HEADS, TOKENS, SIZE = 2, 24, 8
METHOD = ActQKV(recent=4, window=3, block=5, representatives=2)


def test_a_token_weighs_as_much_as_its_query_deviates_from_the_window_in_variances():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[True] * 6, [False, False, True, True, True, False], [False] * 5 + [True]])
    found = activation_bias(rows, seen)
    for row, mask in zip(found, seen, strict=True):
        own = rows[mask]
        if len(own) > 1:
            variance = own.var(0, correction=0)
            bias = ((own - own.mean(0)).square() / (variance + variance.mean() / 100)).sum(1)
            torch.testing.assert_close(row[mask], bias / bias.sum())
        assert (row[~mask] == 0).all()
    assert found[2, 5] == 1  # alone
    unusual = torch.zeros(6, 4)
    unusual[1], unusual[3] = 2.0, -2.0
    assert activation_bias(unusual, seen[:1]).tolist() == [[0, 0.5, 0, 0.5, 0, 0]]


def test_the_probe_is_the_weighted_mean_of_the_window_s_queries():
    queries = torch.randn(5, HEADS * 2, SIZE, generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[False, True, True, True, False]])
    weights = activation_bias(queries.flatten(1), seen)[0]
    expected = (weights[:, None, None] * queries).sum(0)
    torch.testing.assert_close(METHOD.guide(queries, seen, None)[0], expected)


def layer(number, queries, keys):
    return (
        [],
        Recent(keys, torch.randn_like(keys), torch.arange(TOKENS, dtype=torch.int32), queries),
        Place(number, 2, TOKENS, 6, PLAIN),
    )


def given(number=0, asked=7):
    """A layer whose last queries attend to token `asked`."""
    keys = 0.1 * torch.randn(HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(number))
    keys[:, asked, 0] = 20.0
    queries = torch.zeros(3, HEADS * 2, SIZE)
    queries[..., 0] = 1.0
    return layer(number, queries, keys)


def test_a_block_is_known_by_its_keys_that_receive_most_attention():
    before, recent, place = given()
    recent.keys[:, 9, 0] = 19.0
    (segment,) = METHOD.compress(before, recent, place).segments
    torch.testing.assert_close(segment.known[:, 1], (recent.keys[:, 7] + recent.keys[:, 9]) / 2)
    assert segment.known.shape == (HEADS, 4, SIZE)  # twenty tokens in four blocks of five


def test_the_block_that_agrees_with_the_probe_is_read_whole():
    before, recent, place = given()
    (segment,) = METHOD.compress(before, recent, place).segments
    chosen = segment.asked(recent.queries[:1]).choose(recent.queries[:1], PLAIN)
    assert chosen[:, 0, :5].tolist() == [[5, 6, 7, 8, 9]] * HEADS
    assert chosen.shape == (HEADS, 1, 6)


def test_layers_with_flat_scores_read_more():
    # All blocks of the second layer are alike; one of the first agrees with the probe, and the others disagree.
    even = torch.ones(HEADS, TOKENS, SIZE)
    peaked = -even.clone()
    peaked[:, 5:10] = 1.0
    queries = torch.ones(3, HEADS * 2, SIZE)
    kept = METHOD.compress_layers([layer(0, queries, peaked), layer(1, queries, even)])
    budgets = [one.segments[0].budget for one in kept]
    assert sum(budgets) == 12
    assert budgets[0] < budgets[1]


def test_the_density_of_equal_scores_is_one_and_falls_with_a_single_large_one():
    assert density(torch.zeros(1, 1, 7)) == pytest.approx(1)
    assert density(torch.tensor([[[1.0, -1.0, -1.0]]])) < 0.8
    assert density(torch.ones(1, 1, 1)) == 1


@pytest.mark.parametrize(
    ("total", "weights", "most", "expected"),
    [
        (12, [1.0, 3.0], [20, 20], [3, 9]),
        (12, [1.0, 3.0], [20, 7], [5, 7]),
        (40, [1.0, 3.0], [10, 10], [10, 10]),
        (10, [1.0, 1.0, 1.0], [9, 9, 9], [3, 4, 3]),
    ],
)
def test_a_budget_is_shared_in_proportion_up_to_what_each_can_take(total, weights, most, expected):
    assert shared_out(total, weights, most) == expected
