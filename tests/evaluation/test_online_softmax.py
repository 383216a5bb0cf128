import math

import pytest
import torch
from torch import Tensor

from hasten.accel.evaluation.online_softmax import Divergence, LogSumExp, MostLikely, PickedLogits

# Vocabularies and tiles that do not fit into each other, and one tile.
SIZES = [(1, 5, 2), (3, 97, 10), (130, 1031, 256), (7, 64, 64), (5, 33, 1)]
CPU = torch.device("cpu")


def random(rows: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4


def extremes(rows: int, vocabulary: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of logits of the original and of the model."""
    ramp = torch.linspace(-1e4, 1e4, vocabulary).expand(rows, -1)
    equal = torch.full((rows, vocabulary), 7.25)
    spread = random(rows, vocabulary, 2)
    certain = torch.full((rows, vocabulary), -1e4).scatter(1, torch.arange(rows)[:, None] % vocabulary, 1e4)
    return {
        "random": (random(rows, vocabulary, 0), random(rows, vocabulary, 1)),
        "rising, so that every tile has a larger maximum": (ramp, ramp + spread / 4),
        "falling": (ramp.flip(1), ramp.flip(1) + spread / 4),
        "all equal": (equal, equal - 3),
        "equal against random": (equal, spread),
        "certain and wrong": (certain, -certain),
        "large and close": (spread + 1e4, spread + 1e4 + random(rows, vocabulary, 3) / 100),
    }


def tiles(columns: int, *logits: Tensor) -> list[tuple[int, list[Tensor]]]:
    vocabulary = logits[0].shape[1]
    starts = range(0, vocabulary, columns)
    return [(first, [one[:, first : first + columns] for one in logits]) for first in starts]


@pytest.mark.parametrize(("rows", "vocabulary", "columns"), SIZES)
def test_sums_are_those_of_the_whole_vocabulary_in_float64(rows: int, vocabulary: int, columns: int) -> None:
    for name, (original, model) in extremes(rows, vocabulary).items():
        divergence = Divergence(rows, CPU)
        likeliest = MostLikely(rows, CPU)
        for first, (original_tile, model_tile) in tiles(columns, original, model):
            divergence.add(original_tile, model_tile)
            likeliest.add(first, model_tile, divergence.model.maximum)
        log_p, log_q = original.double().log_softmax(-1), model.double().log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        scale = float(max(original.abs().max(), model.abs().max()))
        # float32 holds differences of logits, and their weights, to 6e-8.
        torch.testing.assert_close(divergence.value(), expected, rtol=1e-6, atol=3e-7 * max(1.0, scale), msg=name)
        for one, logits in ((divergence.original, original), (divergence.model, model)):
            torch.testing.assert_close(one.value(), logits.double().logsumexp(-1), rtol=1e-7, atol=2e-7, msg=name)
        assert torch.equal(model.gather(1, likeliest.entry[:, None])[:, 0], model.amax(-1)), name


@pytest.mark.parametrize(("rows", "vocabulary", "columns"), SIZES)
def test_a_divergence_from_itself_is_exactly_zero(rows: int, vocabulary: int, columns: int) -> None:
    for original, _ in extremes(rows, vocabulary).values():
        divergence = Divergence(rows, CPU)
        for _, (tile,) in tiles(columns, original):
            divergence.add(tile, tile.clone())
        assert torch.equal(divergence.value(), torch.zeros(rows, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "vocabulary", "columns"), SIZES)
def test_probabilities_of_the_tiles_are_the_softmax(rows: int, vocabulary: int, columns: int) -> None:
    for logits, _ in extremes(rows, vocabulary).values():
        running = LogSumExp(rows, CPU)
        for _, (tile,) in tiles(columns, logits):
            running.add(tile)
        found = torch.cat([running.probabilities(tile) for _, (tile,) in tiles(columns, logits)], 1)
        torch.testing.assert_close(found.double(), logits.double().softmax(-1), rtol=2e-6, atol=1e-30)


def test_small_divergences_keep_their_digits() -> None:
    original = random(64, 3001, 0)
    model = original + random(64, 3001, 1) / 400
    divergence = Divergence(64, CPU)
    for _, pair in tiles(512, original, model):
        divergence.add(*pair)
    log_p, log_q = original.double().log_softmax(-1), model.double().log_softmax(-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum())
    assert expected / 64 < 1e-4
    # The mean over tokens counts: single tokens are rounded to about 1e-8 nats.
    assert float(divergence.value().sum()) == pytest.approx(expected, rel=1e-3)


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    likeliest, running = MostLikely(2, CPU), LogSumExp(2, CPU)
    for first, (tile,) in tiles(2, logits):
        running.add(tile)
        likeliest.add(first, tile, running.maximum)
    assert likeliest.entry.tolist() == [1, 0]


@pytest.mark.parametrize("columns", [1, 4, 11, 50])
def test_picked_logits_are_gathered_across_tiles(columns: int) -> None:
    logits = random(6, 50, 0)
    for number in (1, 9):
        entries = torch.randint(0, 50, (6, number), generator=torch.Generator().manual_seed(number))
        picked = PickedLogits(entries)
        for first, (tile,) in tiles(columns, logits):
            picked.add(first, tile)
        assert torch.equal(picked.value(), logits.gather(1, entries))


def test_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log(2/3).
    divergence = Divergence(1, CPU)
    for first in range(2):
        divergence.add(torch.tensor([[0.0]]), torch.tensor([[(1.0, 3.0)[first]]]).log())
    assert float(divergence.value()) == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2, rel=1e-6)
