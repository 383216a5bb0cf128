import math

import pytest
import torch

from hasten.accel.evaluation.guessing import guessing_perplexity, is_guessing


def test_the_first_tokens_are_predicted_as_worked_out_by_hand() -> None:
    # 1/8; then an escape of 1/2 to one of 7; then 1 of 2 tokens and 2 escapes: 1/4.
    expected = (8 * 14 * 4) ** (1 / 3)
    assert guessing_perplexity(torch.tensor([3, 5, 3]), 8) == pytest.approx(min(8.0, expected))


def test_a_short_text_of_new_tokens_is_guessed_uniformly() -> None:
    assert guessing_perplexity(torch.arange(16), 4096) == 4096


def test_a_long_text_is_guessed_at_the_entropy_of_its_frequencies() -> None:
    probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = torch.multinomial(probs, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    # The entropy is 1.75 bits; what 20,000 tokens vary by, and what learning four counts costs, is below a percent.
    assert guessing_perplexity(tokens, 4096) == pytest.approx(2**1.75, rel=0.01)


@pytest.mark.parametrize(("perplexity", "guesses"), [(50.0, False), (89.0, False), (91.0, True), (4096.0, True)])
def test_a_model_guesses_unless_it_is_clearly_better(perplexity: float, guesses: bool) -> None:
    assert is_guessing(perplexity, 100.0) == guesses


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_a_perplexity_that_is_not_finite_is_that_of_guessing(perplexity: float) -> None:
    assert is_guessing(perplexity, 100.0)
