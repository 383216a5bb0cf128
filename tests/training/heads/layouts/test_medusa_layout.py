"""Medusa's layout: what its own code computes from a folder, and what a folder of it drafts here."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.layouts.loading import layout_of, layouts, load_any_head
from hasten.accel.training.heads.medusa import Medusa
from tests.training.heads.layouts.noisy import noisy

FACTS = replace(TargetFacts.of(resolve("embedded:target")), vocabulary=50, hidden_size=8)
LAYOUT = layouts()["medusa"]


@pytest.mark.parametrize("shares_output", [False, True])
def test_a_folder_holds_what_medusas_own_code_computes_with(tmp_path, shares_output):
    head = Medusa(depth=3, shares_output=shares_output)
    network = noisy(head, FACTS)
    LAYOUT.write(network, head, tmp_path, FACTS, "org/target")
    hidden = torch.randn(5, FACTS.hidden_size, generator=torch.Generator().manual_seed(1))
    for tensors in (
        torch.load(tmp_path / "medusa_lm_head.pt", weights_only=True),
        load_file(tmp_path / "medusa_lm_head.safetensors"),
    ):
        assert sorted(tensors) == sorted(
            f"{k}.{name}" for k in range(3) for name in ("0.linear.weight", "0.linear.bias", "1.weight")
        )
        for k in range(3):
            part = {name: tensors[f"{k}.{name}"].float() for name in ("0.linear.weight", "0.linear.bias", "1.weight")}
            block = hidden + F.silu(F.linear(hidden, part["0.linear.weight"], part["0.linear.bias"]))
            torch.testing.assert_close(block @ part["1.weight"].T, network.logits(hidden, k + 1))


def test_a_folder_is_found_and_read_though_its_config_counts_fewer_heads(tmp_path):
    head = Medusa(depth=3)
    network = noisy(head, FACTS)
    LAYOUT.write(network, head, tmp_path, FACTS, "org/target")
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')  # as published
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    assert layout_of(tmp_path) is LAYOUT
    found, loaded, _ = load_any_head(tmp_path, Medusa, FACTS)
    assert found == head
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"40 of 50 ids.*draft_vocabulary=0"):
        LAYOUT.write(noisy(Medusa(), FACTS, ids=40), Medusa(), tmp_path, FACTS, "org/target")
    with pytest.raises(UserError, match="blocks=1"):
        LAYOUT.write(noisy(Medusa(blocks=2), FACTS), Medusa(blocks=2), tmp_path, FACTS, "org/target")
    assert not list(tmp_path.iterdir())


def test_heads_without_output_layers_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.zeros(8, 8), "0.0.linear.bias": torch.zeros(8)}, path)
    with pytest.raises(UserError, match="version 2"):
        load_any_head(tmp_path, Medusa, FACTS)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_any_head(tmp_path, Medusa, FACTS)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"0.0.linear.weight": print}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_any_head(tmp_path, Medusa, FACTS)


def test_a_head_of_another_target_is_refused(tmp_path):
    LAYOUT.write(noisy(Medusa(), FACTS), Medusa(), tmp_path, FACTS, "org/target")
    with pytest.raises(UserError, match="does not fit the target"):
        load_any_head(tmp_path, Medusa, replace(FACTS, hidden_size=16))
