"""How heads are stored."""

import pytest
import torch
from safetensors.torch import save_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import WEIGHTS, TargetFacts, load_head
from hasten.accel.training.heads.eagle import Eagle
from hasten.accel.training.heads.stored import INT8, from_stored, to_stored
from tests.decoding.drafters.heads.untrained import network_of


def test_each_row_has_a_scale_of_its_own_and_a_row_of_zeros_stays_zero():
    weight = torch.tensor([[127.0, -64.0, 1.0], [0.0127, 0.0, -0.0064], [0.0, 0.0, 0.0]])
    stored = to_stored({"w": weight, "norm": torch.ones(3)}, INT8)
    assert stored["w"].tolist() == [[127, -64, 1], [127, 0, -64], [0, 0, 0]]
    found = from_stored(stored)
    assert found.keys() == {"w", "norm"}
    torch.testing.assert_close(found["w"], weight)


def test_an_error_is_at_most_half_a_step_of_its_row():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    error = (from_stored(to_stored({"w": weight}, INT8))["w"] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()  # rounding of the product
    assert error.max() > 0


def test_a_head_in_8_bits_is_loaded_and_takes_half_the_bytes(tmp_path):
    head, facts = Eagle(), TargetFacts.of(resolve("embedded:target"))
    network = network_of(head)
    head.save(network, tmp_path / "wide", facts, {})
    head.save(network, tmp_path / "narrow", facts, {}, INT8)
    wide, narrow = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("wide", "narrow"))
    assert narrow < 0.55 * wide
    _, loaded, _ = load_head(tmp_path / "narrow", Eagle, facts)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=2**-8, atol=float(tensor.abs().max()) / 254)


def test_a_file_without_a_scale_is_damaged(tmp_path):
    head, facts = Eagle(), TargetFacts.of(resolve("embedded:target"))
    network = network_of(head)
    head.save(network, tmp_path, facts, {}, INT8)
    tensors = to_stored(network.state_dict(), INT8)
    tensors["d2t"] = network.vocabulary.d2t
    del tensors["output.weight.scale"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="damaged"):
        load_head(tmp_path, Eagle, facts)
