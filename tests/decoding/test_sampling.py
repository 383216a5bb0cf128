from math import inf, nan

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.accel.decoding.sampling import Sampling, draw, most_probable
from hasten.accel.errors import UserError

ROWS, VOCABULARY = 16, 300


def theirs(sampling, logits, seen):
    """What transformers samples from, in the order in which `generate` applies it."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(seen, logits).softmax(-1)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 20, VOCABULARY, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, repetition_penalty):
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    seen = torch.randint(VOCABULARY, (ROWS, 40), generator=generator)
    ours = torch.stack([sampling.probs(sampling.penalised(*row)) for row in zip(logits, seen, strict=True)])
    assert torch.equal(ours, theirs(sampling, logits, seen))


SMALL = [1e-3, 1e-7, 1e-20, 1e-40, 5e-324]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("temperature", SMALL)
def test_small_temperatures_tend_to_the_most_probable_token(temperature, options, scale):
    logits = scale * torch.arange(-40.0, 10.0)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    logits[3] = -torch.inf  # models mask tokens so
    sampling, greedy = Sampling(temperature, **options), Sampling(0.0, **options)
    seen = torch.tensor([1, 3, 5])
    probs = sampling.probs(sampling.penalised(logits, seen))
    assert probs.isfinite().all()
    assert probs.sum() == pytest.approx(1)
    if temperature < 1e-3 * scale:
        assert torch.equal(probs, greedy.probs(greedy.penalised(logits, seen)))
        assert draw(probs, torch.Generator().manual_seed(0)) == int(probs.argmax())


def test_a_small_temperature_shares_between_equal_logits():
    assert Sampling(1e-40).probs(torch.tensor([3.0, 1.0, 3.0])).tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("temperature", [1e4, 1e30, 1e38, 1e39, 1e308])
def test_large_temperatures_tend_to_equal_shares_of_the_possible_tokens(temperature):
    logits = torch.tensor([30.0, -30.0, -torch.inf, 5.0])
    expected = torch.tensor([1 / 3, 1 / 3, 0, 1 / 3])
    torch.testing.assert_close(Sampling(temperature).probs(logits), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e-30, 1e30, 1e300])
def test_an_extreme_penalty_gives_a_distribution(penalty):
    sampling = Sampling(0.7, repetition_penalty=penalty)
    logits = torch.tensor([0.0, 20.0, -20.0, -torch.inf])
    probs = sampling.probs(sampling.penalised(logits, torch.tensor([0, 1, 2, 3])))
    assert probs.isfinite().all()
    assert probs.sum() == pytest.approx(1)
    assert probs[3] == 0


def test_rows_are_distributions_of_their_own():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(), Sampling(0.7, top_k=3, top_p=0.8)):
        assert torch.equal(sampling.probs(logits), torch.stack([sampling.probs(row) for row in logits]))


def test_temperature_0_is_one_hot_at_the_most_probable_token_whatever_else_is_asked_for():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Sampling(0.0, top_k=2, top_p=0.5).probs(logits).tolist() == [0, 1, 0]
    assert Sampling(0.0).is_greedy


def test_a_penalty_moves_seen_tokens_away_from_being_chosen():
    found = Sampling(repetition_penalty=2.0).penalised(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([0, 1, 1]))
    assert found.tolist() == [1, -2, 3]


def test_draws_follow_the_distribution_and_never_give_what_it_does_not_have():
    probs = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    generator, count = torch.Generator().manual_seed(0), 5000
    found = torch.tensor([draw(probs, generator) for _ in range(count)]).bincount(minlength=6)
    assert found[probs == 0].sum() == 0
    expected = count * probs[probs > 0]
    statistic = ((found[probs > 0] - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(1.0), statistic / 2) > 1e-3  # two degrees of freedom


def test_a_draw_takes_one_number_and_does_not_mind_the_sum():
    one, twin = (torch.Generator().manual_seed(0) for _ in range(2))
    probs = torch.tensor([0.2, 0.5, 0.3])
    assert draw(probs, one) == draw(7 * probs, twin)
    assert torch.equal(one.get_state(), twin.get_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, -5e-324, nan, inf)),
        *(("top_p", value) for value in (0, 1.1, nan)),
        *(("repetition_penalty", value) for value in (0, -1, nan, inf)),
        ("top_k", -1),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}={value} is wrong: expected"):
        Sampling(**{name: value})


@pytest.mark.parametrize("vocabulary", [50, 640, 8192])
def test_the_most_probable_ids_are_those_of_topk(vocabulary):
    logits = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(0))
    values, ids = most_probable(logits, 8)
    expected = logits.topk(8, -1)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)
