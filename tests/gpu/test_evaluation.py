"""Perplexity and divergence of whole models, block by block."""

import pytest
import torch

from hasten.accel.evaluation.divergence import evaluate
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

pytestmark = pytest.mark.gpu


def test_metrics_are_those_of_a_cpu(on_cpu, on_device, device, token_ids):
    draft = embedded.path("draft")
    expected = evaluate(Architecture(Checkpoint(draft)), token_ids, on_cpu).metrics()
    found = evaluate(Architecture(Checkpoint(draft), device=device), token_ids, on_device).metrics()
    assert found["tokens"] == expected["tokens"]
    # A near tie of two tokens may fall either way.
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=5 / expected["tokens"])
    for name in ("perplexity", "perplexity_original", "kl_divergence"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name  # float32 through four blocks


def test_a_model_does_not_diverge_from_itself(folder, on_device, device, token_ids):
    found = evaluate(Architecture(Checkpoint(folder), device=device), token_ids, on_device).metrics()
    assert found["kl_divergence"] == 0
    assert found["top1_agreement"] == 1


def test_bfloat16_diverges_little_from_float32(folder, on_device, device, token_ids):
    reduced = Architecture(Checkpoint(folder), torch.bfloat16, device)
    found = evaluate(reduced, token_ids, on_device).metrics()
    assert 0 < found["kl_divergence"] < 1e-2
