import math

import pytest
import torch
from torch import Tensor

from hasten.accel.compression.search.fitness import KL, Fitness, Perplexity, SparseKL, Tiles
from hasten.accel.errors import UserError

VOCABULARY = 40
FITNESSES = [KL(), SparseKL(), SparseKL(5), Perplexity()]


def logits(seed: int, tokens: int = 12, spread: float = 3.0) -> Tensor:
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def candidate() -> Tensor:
    return logits(0) + logits(1, spread=0.3)


TARGETS = torch.randint(0, VOCABULARY, (12,), generator=torch.Generator().manual_seed(2))


def tiles(logits: Tensor, columns: int = 7) -> Tiles:
    """Tiles of so many entries, of which the last is smaller."""
    for first in range(0, logits.shape[1], columns):
        yield first, logits[:, first : first + columns].clone()


def loss(fitness: Fitness, original: Tensor, changed: Tensor, columns: int = 7) -> float:
    targets = TARGETS[: len(original)]
    return fitness.loss(tiles(changed, columns), targets, fitness.reference(tiles(original, columns), targets))


def divergence(original: Tensor, changed: Tensor) -> float:
    """Sum over tokens of KL(original || changed), in float64."""
    p, q = original.double().log_softmax(-1), changed.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def test_kl_is_the_divergence_over_the_whole_vocabulary() -> None:
    assert loss(KL(), logits(0), candidate()) == pytest.approx(divergence(logits(0), candidate()), rel=1e-5)


def test_sparse_kl_is_kl_where_it_keeps_the_whole_vocabulary() -> None:
    for top_k in (VOCABULARY, 10 * VOCABULARY):
        found = loss(SparseKL(top_k), logits(0), candidate())
        assert found == pytest.approx(divergence(logits(0), candidate()), rel=1e-5)


def test_sparse_kl_never_exceeds_kl_and_rises_with_top_k() -> None:
    for seed in range(20):
        changed = logits(0) + logits(seed + 10, spread=0.5 + seed / 10)
        sparse = [loss(SparseKL(top_k), logits(0), changed) for top_k in (1, 2, 5, 20)]
        assert sparse == sorted(sparse)
        assert sparse[-1] <= divergence(logits(0), changed)
        assert sparse[0] < 0.8 * sparse[-1]  # else the bounds would show nothing


def test_sparse_kl_of_two_classes_by_hand() -> None:
    original = torch.tensor([[0.5, 0.25, 0.25]]).log()
    changed = torch.tensor([[0.25, 0.5, 0.25]]).log()
    # The likeliest token, and the other two as one class: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75).
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert loss(SparseKL(1), original, changed) == pytest.approx(expected, rel=1e-5)


def test_sparse_kl_sees_mass_that_leaves_the_kept_tokens() -> None:
    original = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    changed = torch.tensor([[0.25, 0.15, 0.3, 0.3]]).log()
    # Renormalised over the two kept tokens both are 5 : 3.
    expected = 0.8 * math.log(2) + 0.2 * math.log(1 / 3)
    assert loss(SparseKL(2), original, changed) == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_cross_entropy_with_the_text() -> None:
    expected = torch.nn.functional.cross_entropy(candidate(), TARGETS, reduction="sum")
    assert loss(Perplexity(), logits(0), candidate()) == pytest.approx(float(expected), rel=1e-6)
    assert not Perplexity().needs_original
    assert Perplexity().reference(tiles(logits(0)), TARGETS) == {}


@pytest.mark.parametrize("fitness", FITNESSES, ids=str)
def test_tiles_of_any_size_give_the_same_loss(fitness: Fitness) -> None:
    whole = loss(fitness, logits(0), candidate(), VOCABULARY)
    for columns in (1, 7, 39):
        assert loss(fitness, logits(0), candidate(), columns) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("fitness", [KL(), SparseKL(), SparseKL(5)], ids=str)
def test_a_model_does_not_diverge_from_itself(fitness: Fitness) -> None:
    for spread in (0.1, 3.0, 30.0):
        assert abs(loss(fitness, logits(0, spread=spread), logits(0, spread=spread))) < 12 * 1e-6


def test_the_divergence_of_a_model_from_itself_is_exactly_zero() -> None:
    for spread in (0.1, 3.0, 30.0):
        assert loss(KL(), logits(0, spread=spread), logits(0, spread=spread)) == 0


@pytest.mark.parametrize("fitness", FITNESSES, ids=str)
def test_losses_add_up_over_tokens(fitness: Fitness) -> None:
    stored = fitness.reference(tiles(logits(0)), TARGETS)
    assert all(len(value) == len(TARGETS) for value in stored.values())
    parts = [
        fitness.loss(tiles(candidate()[rows]), TARGETS[rows], {name: value[rows] for name, value in stored.items()})
        for rows in (slice(0, 5), slice(5, 12))
    ]
    # Sums over the vocabulary may be blocked otherwise for other row counts.
    assert sum(parts) == pytest.approx(loss(fitness, logits(0), candidate()), rel=1e-5)


@pytest.mark.parametrize("fitness", FITNESSES, ids=str)
def test_a_shift_of_all_logits_changes_nothing(fitness: Fitness) -> None:
    # float32 holds logits near 50 to 4e-6.
    assert loss(fitness, logits(0), candidate() + 50) == pytest.approx(loss(fitness, logits(0), candidate()), abs=2e-4)


@pytest.mark.parametrize("fitness", FITNESSES, ids=str)
def test_certain_predictions_give_finite_losses(fitness: Fitness) -> None:
    certain = torch.zeros(12, VOCABULARY)
    certain[:, 3] = 200.0
    for original, changed in ((certain, logits(0)), (logits(0), certain), (certain, certain)):
        assert math.isfinite(loss(fitness, original, changed))


def test_what_is_kept_of_the_original_takes_k_values_a_token() -> None:
    stored = SparseKL(5).reference(tiles(logits(0)), TARGETS)
    assert sum(value.nbytes for value in stored.values()) == len(TARGETS) * (5 * 8 + 4)
    assert stored["ids"].dtype == torch.int32
    best = logits(0).topk(5).indices.sort().values
    assert torch.equal(stored["ids"].sort().values.long(), best)
    log_probs = logits(0).double().log_softmax(-1)
    kept = log_probs.gather(-1, stored["ids"].long())
    torch.testing.assert_close(stored["log_probs"].double(), kept, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored["tail"].double(), 1 - kept.exp().sum(-1), rtol=1e-5, atol=1e-7)


def test_top_k_must_be_one_or_more() -> None:
    with pytest.raises(UserError, match="top_k=0 is out of range: 1 or more"):
        SparseKL(0)
