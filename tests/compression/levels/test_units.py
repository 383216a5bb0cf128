import pytest
import torch

from hasten.accel.compression.allocators.base import DROP, size
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import KEEP, make_levels
from hasten.accel.compression.levels.units import dropped_parts, layer_levels, make_units
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.errors import UserError
from tests.compression import local
from tests.models import tiny

TOKENS = tiny.tokens(4, 16)
LEVELS = make_levels([2, 4], [32], True, [0.75])


def make(folder, family):
    source = tiny.save(folder / "model", family, dtype=torch.bfloat16)
    chosen = local.settings(source, folder / "levels", levels=LEVELS, level=LEVELS[0], pruner=Wanda())
    local.compress(chosen, TOKENS)
    return LevelDatabase.read(chosen.output, Task(chosen).architecture)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), "llama")


def test_sizes_are_known_before_anything_is_solved(llama):
    planned = make_units(llama, "serving", keep=True, drop=["attention", "block"], solved=False)
    solved = make_units(llama, "serving", keep=True, drop=["attention", "block"])
    for before, after in zip(planned, solved, strict=True):
        assert before.name == after.name
        assert [choice.bits for choice in before.choices] == [choice.bits for choice in after.choices]
    for unit in solved:
        for choice in unit.choices:
            if unit.layers and choice.level != KEEP:
                facts = [llama.facts(layer)[choice.level] for layer in unit.layers]
                assert choice.bits == sum(row["stored_bits"] for row in facts)


def test_choices_rise_in_bits_and_keeping_costs_what_the_checkpoint_has(llama):
    for unit in make_units(llama, "none", keep=True):
        assert [choice.level for choice in unit.choices] == ["w2g32", "w4g32", "s75", KEEP]
        bits = [choice.bits for choice in unit.choices]
        assert bits == sorted(bits)
        assert (unit.choices[-1].bits, unit.choices[-1].error) == (16 * unit.weights, 0.0)


def test_a_dropped_block_counts_nothing_and_a_dropped_part_the_zeros_that_stand_for_it(llama):
    units = make_units(llama, "none", drop=["attention", "mlp", "block"])
    names = [unit.name for unit in units]
    kept = [len(unit.choices) - 1 if not unit.layers else 0 for unit in units]

    def without(part):
        chosen = list(kept)
        chosen[names.index(part)] = 0
        return size(units, chosen)

    inside = dict.fromkeys(("attention of block 1", "mlp of block 1"), 0)
    zeros = dict(inside)
    for unit in units:
        if unit.block == 1 and unit.layers:
            inside[unit.part_of] += unit.choices[0].bits
            rows = unit.weights // (64 if unit.kind != "mlp.down_proj" else 128)
            zeros[unit.part_of] += 2 * unit.weights + 16 * rows
    assert size(units, kept) - without("block of block 1") == sum(inside.values())
    for part, bits in inside.items():
        assert size(units, kept) - without(part) == bits - zeros[part]


def test_an_assignment_says_which_level_a_layer_gets_and_which_parts_go(llama):
    units = make_units(llama, "serving", drop=["mlp"])
    assignment = {unit.name: unit.choices[0].level for unit in units}
    assignment["mlp of block 0"] = KEEP
    assert dropped_parts(units, assignment) == {1: {"mlp"}}
    levels = layer_levels(units, assignment)
    assert len(levels) == 14
    assert set(levels.values()) == {"w2g32"}
    assert assignment["mlp of block 1"] == DROP


def test_an_unknown_part_is_refused(llama):
    with pytest.raises(UserError, match="drop=atention is none of attention, mlp, block"):
        make_units(llama, "none", drop=["atention"])


def test_experts_of_all_blocks_are_one_unit_and_cannot_be_dropped(tmp_path):
    database = make(tmp_path, "mixtral")
    (experts,) = [unit for unit in make_units(database, "none") if unit.kind == "experts"]
    assert {layer.split(".")[2] for layer in experts.layers} == {"0", "1"}
    assert make_units(database, "none", drop=["attention"])
    with pytest.raises(UserError, match=r"drop=\[mlp\] cannot leave out experts"):
        make_units(database, "none", drop=["mlp"])


def test_experts_that_too_few_tokens_reached_add_no_error_to_those_of_the_others(tmp_path):
    source = tiny.save(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16)
    seen = local.compress(
        local.settings(source, tmp_path / "all", levels=LEVELS, level=LEVELS[0], pruner=Wanda()), TOKENS
    )
    experts = sorted(row["tokens"] for row in seen if ".experts." in row["layer"])
    few = experts[len(experts) // 2]
    chosen = local.settings(
        source, tmp_path / "levels", levels=LEVELS, level=LEVELS[0], pruner=Wanda(), expert_tokens=few
    )
    rows = local.compress(chosen, TOKENS)
    reached = [row for row in rows if ".experts." in row["layer"] and row["tokens"] >= few]
    assert {row["error_of"] for row in reached} == {"output"}
    assert {row["error_of"] for row in rows if ".experts." in row["layer"] and row["tokens"] < few} == {"weights"}
    database = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    unit = next(unit for unit in make_units(database, "serving") if unit.kind == "experts")
    for choice in unit.choices:
        expected = sum(row["error"] for row in reached if row["level"] == choice.level)
        assert choice.error == pytest.approx(expected)
