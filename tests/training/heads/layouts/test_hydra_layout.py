"""Hydra's layout: what its own code computes from a folder, and what a folder of it drafts here."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.hydra import Hydra
from hasten.accel.training.heads.hydra_pp import HydraPP
from hasten.accel.training.heads.layouts.loading import layout_of, layouts, load_any_head
from hasten.accel.training.heads.medusa import Medusa
from tests.training.heads.layouts.noisy import noisy

FACTS = replace(
    TargetFacts.of(resolve("embedded:target")),
    vocabulary=50,
    hidden_size=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    intermediate_size=12,
    rope_theta=10000.0,
)
LAYOUT = layouts()["hydra"]


def written(head, folder, facts=FACTS, ids=None):
    network = noisy(head, facts, ids)
    LAYOUT.write(network, head, folder, facts, "org/target")
    return network, torch.load(folder / "hydra_lm_head.pt", weights_only=True)


@pytest.mark.parametrize("shares_output", [False, True])
def test_a_folder_holds_what_hydras_own_code_computes_with(tmp_path, shares_output):
    network, tensors = written(Hydra(depth=2, blocks=2, shares_output=shares_output), tmp_path)
    x = torch.randn(5, 3 * FACTS.hidden_size, generator=torch.Generator().manual_seed(1))

    def linear(name, value):
        return F.linear(value, tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float())

    y = linear("hydra_mlp.1.0.res_connection", x) + F.silu(linear("hydra_mlp.1.0.linear", x))
    y = y + F.silu(linear("hydra_mlp.1.1.linear", y))
    torch.testing.assert_close(linear("hydra_lm_head.1", y), network.logits(x, 2))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hydra_head_arch"] == "mlp"
    # Without it, their code builds heads that read no drafted tokens.
    assert config["grounded_heads"] is True


def test_names_of_hydra_pp_count_dropout_layers_and_split_fused_products(tmp_path):
    network, tensors = written(HydraPP(depth=2, blocks=3, shares_blocks=True), tmp_path)
    names = {name for name in tensors if not name.startswith("prefix")}
    assert names == {
        f"hydra_{name}.{part}"
        for depth in range(2)
        for name in (
            f"mlp.{depth}.1.linear",
            f"mlp.{depth}.1.res_connection",
            f"mlp.{depth}.3.linear",
            f"mlp.{depth}.5.linear",
            f"lm_head.{depth}.1",
        )
        for part in ("weight", "bias")
    }
    attention = "prefix_embeding_layer.layers.0.self_attn"
    assert [tuple(tensors[f"{attention}.{name}_proj.weight"].shape) for name in "qkvo"] == [
        (8, 8),
        (4, 8),
        (4, 8),
        (8, 8),
    ]
    keys = network.prefix.attention.qkv.weight[8:12]
    assert torch.equal(tensors[f"{attention}.k_proj.weight"].float(), keys)


@pytest.mark.parametrize(
    "head", [Hydra(depth=2), HydraPP(depth=2, blocks=3, shares_blocks=True)], ids=lambda h: h.drafter
)
def test_a_folder_is_found_and_read_without_what_nothing_uses(tmp_path, head):
    network, tensors = written(head, tmp_path)
    if isinstance(head, HydraPP):
        tensors["prefix_embeding_layer.embed_tokens.weight"] = torch.zeros(50, 8)
        tensors["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    torch.save(tensors, tmp_path / "hydra_lm_head.pt")
    assert layout_of(tmp_path) is LAYOUT
    found, loaded, _ = load_any_head(tmp_path, type(head), replace(FACTS, rope_theta=5e5))
    assert found == replace(head, shares_blocks=False)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    if isinstance(head, HydraPP):
        assert torch.equal(loaded.prefix.attention.inverse_frequencies, network.prefix.attention.inverse_frequencies), (
            "their base is 10000, whatever the target's is"
        )


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"40 of 50 ids.*draft_vocabulary=0"):
        written(Hydra(), tmp_path, ids=40)
    with pytest.raises(UserError, match="shares_blocks=true"):
        written(HydraPP(), tmp_path)
    with pytest.raises(UserError, match="rope_theta 500000"):
        written(HydraPP(shares_blocks=True), tmp_path, replace(FACTS, rope_theta=5e5))
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_understood_are_refused(tmp_path):
    written(Hydra(), tmp_path)
    with pytest.raises(UserError, match="is a head of hydra: expected one of medusa"):
        load_any_head(tmp_path, Medusa, FACTS)
    (tmp_path / "config.json").write_text('{"grounded_heads": false}')
    with pytest.raises(UserError, match="grounded_heads=False"):
        load_any_head(tmp_path, Hydra, FACTS)
    (tmp_path / "config.json").unlink()
    torch.save({"prefix_embeding_layer.norm.weight": torch.ones(8)}, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(UserError, match="it lacks"):
        load_any_head(tmp_path, HydraPP, FACTS)
    torch.save({"other": torch.ones(8)}, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(UserError, match="tensor other"):
        load_any_head(tmp_path, Hydra, FACTS)
