from dataclasses import replace

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.compression.allocators.grouping import group_units, mixed_modules, serving_module
from hasten.accel.errors import UserError


def unit(name, weights=10, levels=(2, 3, 4), part_of=None):
    choices = tuple(Choice(f"w{bits}", weights * bits, weights / 2**bits) for bits in levels)
    block, kind = int(name.split(".")[2]), name.split(".", 3)[3]
    return Unit(name, (name,), block, kind, weights, choices, part_of)


def block(number, *names, **options):
    return [unit(f"model.layers.{number}.{name}", **options) for name in names]


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
DENSE = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_without_grouping_units_stay_as_they_are():
    units = block(0, *ATTENTION, *DENSE)
    assert group_units(units, "none") == units


def test_serving_joins_what_servers_fuse_block_by_block():
    grouped = group_units([*block(0, *ATTENTION, *DENSE), *block(1, *ATTENTION, *DENSE)], "serving")
    assert [one.kind for one in grouped] == [
        *("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ] * 2
    assert [one.block for one in grouped] == [0] * 4 + [1] * 4
    assert [one.name for one in grouped[4:6]] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    assert grouped[0].layers == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def test_bits_errors_and_weights_add_up():
    q, k = unit("model.layers.0.self_attn.q_proj", 40), unit("model.layers.0.self_attn.k_proj", 10)
    (joined,) = group_units([q, k], "serving")
    assert joined.weights == 50
    assert joined.choices == (Choice("w2", 100, 12.5), Choice("w3", 150, 6.25), Choice("w4", 200, 3.125))


def test_a_joined_unit_has_the_levels_that_all_have_by_rising_bits():
    q = unit("model.layers.0.self_attn.q_proj", levels=(2, 3, 4))
    k = unit("model.layers.0.self_attn.k_proj", levels=(3, 4, 5))
    # A level of few codes and many scales: more bits than w3 in one layer, fewer in the other.
    q = replace(q, choices=(*q.choices[:1], Choice("fine", 25), *q.choices[1:]))
    k = replace(k, choices=(*k.choices[:2], Choice("fine", 45), *k.choices[2:]))
    (joined,) = group_units([q, k], "serving")
    assert [(choice.level, choice.bits) for choice in joined.choices] == [("w3", 60), ("fine", 70), ("w4", 80)]


@pytest.mark.parametrize(
    ("parent", "projections"),
    [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_all_experts_of_a_block_share_one_level(parent, projections):
    names = [f"{parent}.experts.{expert}.{one}" for expert in range(4) for one in projections]
    first, second = group_units([*block(0, *names), *block(1, *names)], "serving")
    assert (first.kind, len(first.layers), first.weights) == (f"{parent}.experts", 12, 120)
    assert second.block == 1


def test_a_shared_expert_is_fused_like_a_dense_network():
    names = ["mlp.experts.0.gate_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.gate_proj"]
    modules = [serving_module(f"model.layers.3.{name}") for name in names]
    start = "model.layers.3.mlp"
    assert modules == [
        *(f"{start}.experts", f"{start}.shared_expert.gate_up_proj", f"{start}.shared_expert.gate_up_proj"),
        f"{start}.gate_up_proj",
    ]


def test_layers_that_no_server_fuses_are_not_joined():
    for name in ("fc1", "self_attn.out_proj", "self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert serving_module(f"model.decoder.layers.0.{name}") == f"model.decoder.layers.0.{name}"


def test_parts_are_not_joined_and_joined_layers_stay_inside_them():
    part = Unit("attention", (), 0, "attention", 0, (Choice("drop", 0), Choice("keep", 0)))
    grouped = group_units([part, *block(0, *ATTENTION, part_of="attention")], "serving")
    assert grouped[0] == part
    assert [one.part_of for one in grouped] == [None, "attention", "attention"]


def test_another_rule_of_fusion_can_be_given():
    units = block(0, *ATTENTION, *DENSE)
    grouped = group_units(units, "serving", lambda name: name.rpartition(".")[0])
    assert [len(one.layers) for one in grouped] == [4, 3]


def test_layers_without_a_common_level_are_refused_by_name():
    units = [*block(0, "self_attn.q_proj", levels=(2, 3)), *block(0, "self_attn.k_proj", levels=(4, 6))]
    with pytest.raises(UserError, match=r"no level for model\.layers\.0\.self_attn\.k_proj: it has w4, w6, and model"):
        group_units(units, "serving")
    assert group_units(units, "none") == units


def test_an_unknown_rule_is_refused_with_those_known():
    with pytest.raises(UserError, match=r"grouping='fused' is none of none, serving"):
        group_units(block(0, *ATTENTION), "fused")


def test_layers_of_different_blocks_cannot_be_fused():
    units = [*block(0, *ATTENTION), *block(1, *ATTENTION)]
    with pytest.raises(ValueError, match="lie in different parts of the model"):
        group_units(units, "serving", lambda name: "model")


def test_fused_modules_of_several_levels_are_named():
    levels = {
        "model.layers.0.self_attn.q_proj": "w4",
        "model.layers.0.self_attn.k_proj": "w3",
        "model.layers.0.self_attn.v_proj": "w4",
        "model.layers.0.mlp.gate_proj": "w3",
        "model.layers.0.mlp.up_proj": "w3",
        "model.layers.0.mlp.down_proj": "w8",
        "model.layers.1.mlp.gate_proj": "keep",
        "model.layers.1.mlp.up_proj": "w3",
    }
    assert mixed_modules(levels) == ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"]
