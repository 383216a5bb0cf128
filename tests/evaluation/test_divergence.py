import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import windows
from hasten.accel.models import architecture as architectures
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.allocations import Allocations
from tests.models import tiny

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and the same model with some noise on its weights."""
    original = tiny.save(tmp_path_factory.mktemp("original") / "model", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    changed = tmp_path_factory.mktemp("changed") / "model"
    model.save_pretrained(changed)
    return changed, original


@pytest.fixture(scope="module")
def stream() -> Tensor:
    return torch.randint(0, tiny.VOCABULARY, (LENGTH * 5 + 3,), generator=torch.Generator().manual_seed(0))


def architecture(folder: Path) -> Architecture:
    return Architecture(Checkpoint(folder))


def log_probs(folder: Path, tokens: Tensor) -> Tensor:
    """Log probabilities (N, T, V) float64 by the whole model of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("stride", [LENGTH, 5])
def test_metrics_are_those_of_whole_models(folders: tuple[Path, Path], stream: Tensor, stride: int) -> None:
    cut = windows(stream, LENGTH, stride)
    found = evaluate(architecture(folders[0]), cut, architecture(folders[1]), batch=2).metrics()
    model, original = (log_probs(folder, cut.tokens)[:, :-1] for folder in folders)
    position = torch.arange(1, LENGTH)
    scored = (position >= cut.first[:, None]) & (position < cut.stop[:, None])
    targets = cut.tokens[:, 1:, None]
    expected = {
        "perplexity": math.exp(-model.gather(-1, targets)[..., 0][scored].mean()),
        "perplexity_original": math.exp(-original.gather(-1, targets)[..., 0][scored].mean()),
        "kl_divergence": float((original.exp() * (original - model)).sum(-1)[scored].mean()),
        "top1_agreement": float((original.argmax(-1) == model.argmax(-1))[scored].double().mean()),
        "tokens": int(scored.sum()),
    }
    assert found == pytest.approx(expected, rel=1e-4)  # float32 through two blocks
    assert 0 < expected["top1_agreement"] < 1  # else it would show nothing


def test_a_model_does_not_differ_from_itself(folders: tuple[Path, Path], stream: Tensor) -> None:
    found = evaluate(architecture(folders[1]), windows(stream, LENGTH), architecture(folders[1])).metrics()
    assert found["kl_divergence"] == 0
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == found["perplexity_original"]


def test_without_an_original_there_is_only_perplexity(folders: tuple[Path, Path], stream: Tensor) -> None:
    rows = stream[: LENGTH * 3].reshape(3, LENGTH)
    found = evaluate(architecture(folders[0]), rows).metrics()
    compared = evaluate(architecture(folders[0]), rows, architecture(folders[1])).metrics()
    assert found["perplexity"] == compared["perplexity"]
    assert [name for name, value in found.items() if value is None] == [
        "perplexity_original",
        "kl_divergence",
        "top1_agreement",
    ]


def test_sums_of_parts_are_the_sums_of_the_whole(folders: tuple[Path, Path], stream: Tensor) -> None:
    cut = windows(stream, LENGTH, 5)
    whole = evaluate(architecture(folders[0]), cut, architecture(folders[1]))
    added = sum(
        (evaluate(architecture(folders[0]), cut.part(i, 3), architecture(folders[1])) for i in range(3)), Sums()
    )
    assert (added.tokens, added.agreed) == (whole.tokens, whole.agreed)
    assert added.metrics() == pytest.approx(whole.metrics(), rel=1e-6)  # float32 batches of other sizes


def test_tokens_and_tiles_of_any_number_give_the_same_metrics(
    folders: tuple[Path, Path], stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = windows(stream, LENGTH, 5)
    whole = evaluate(architecture(folders[0]), cut, architecture(folders[1])).metrics()
    for tokens, columns in ((4, 7), (1, 96), (1000, 1), (13, 40)):
        monkeypatch.setattr("hasten.accel.evaluation.divergence.TILE_TOKENS", tokens)
        monkeypatch.setattr("hasten.accel.models.output_layer.tile_columns", lambda *_, columns=columns: columns)
        found = evaluate(architecture(folders[0]), cut, architecture(folders[1])).metrics()
        assert found == pytest.approx(whole, rel=1e-6)  # float32 products of other sizes
        assert found["top1_agreement"] == whole["top1_agreement"]


def test_neither_the_logits_nor_the_output_matrix_are_held(
    tmp_path: Path, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 20011
    folder = tiny.save(tmp_path / "original", "gemma3_text", vocab_size=vocabulary)
    rows = stream[: LENGTH * 4].reshape(4, LENGTH)
    monkeypatch.setattr("hasten.accel.models.output_layer.TILE_LOGITS_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("hasten.accel.models.output_layer.TILE_WEIGHT_BYTES", {"cpu": 1 << 16})
    with Allocations() as allocations:
        evaluate(architecture(folder), rows, architecture(folder))
    matrix, logits = vocabulary * 64 * 4, rows[:, 1:].numel() * vocabulary * 4
    # A block takes 0.2 MB.
    assert allocations.peak < min(matrix, logits) / 5


def test_one_block_is_held_at_a_time(
    folders: tuple[Path, Path], stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = Architecture.stream_block

    def watched(self: Architecture, index: int) -> torch.nn.Module:
        gc.collect()
        assert all(reference() is None for reference in loaded)
        block = load(self, index)
        loaded.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Architecture, "stream_block", watched)
    evaluate(architecture(folders[0]), windows(stream, LENGTH), architecture(folders[1]))
    assert len(loaded) == 4


def test_windows_wait_for_experts_in_lots_which_change_no_figure(
    tmp_path: Path, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tmp_path / "m", "mixtral")
    cut = windows(stream, LENGTH)
    read: list[str] = []
    read_one = Architecture._read
    monkeypatch.setattr(Architecture, "_read", lambda self, name: read.append(name) or read_one(self, name))
    expected = evaluate(architecture(folder), cut, batch=2)
    experts = [name for name in read if ".experts." in name]
    assert len(experts) == len(set(experts)), "once for all windows"
    monkeypatch.setattr(architectures, "WAITING_STATES", 1 << 30)
    assert evaluate(architecture(folder), cut, batch=2) == expected
    assert read.count(experts[0]) == 1 + -(-len(cut) // 2), "once for each lot"
    # The same with all experts in memory.
    monkeypatch.setattr(Architecture, "stream_block", Architecture.load_block)
    assert evaluate(architecture(folder), cut, batch=2) == expected


def test_progress_counts_to_its_total(folders: tuple[Path, Path], stream: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    cut = windows(stream, LENGTH)
    evaluate(architecture(folders[0]), cut, architecture(folders[1]), progress=lambda *at: seen.append(at))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_models_of_two_vocabularies_are_not_compared(
    folders: tuple[Path, Path], stream: Tensor, tmp_path: Path
) -> None:
    other = tiny.build("llama", vocab_size=tiny.VOCABULARY + 8)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vocabulary has 96 tokens and the original's 104"):
        evaluate(architecture(folders[0]), windows(stream, LENGTH), architecture(tmp_path))


def test_perplexity_is_the_exponential_of_the_mean_and_may_be_infinite() -> None:
    assert Sums(tokens=4, nll=4 * math.log(7)).metrics()["perplexity"] == pytest.approx(7)
    assert Sums(tokens=1, nll=1e6).metrics()["perplexity"] == math.inf
    assert math.isnan(Sums(tokens=1, nll=math.nan).metrics()["perplexity"] or 0)
    with pytest.raises(ValueError, match="no token"):
        Sums().metrics()
