import pytest
import torch
from transformers import AutoModelForCausalLM

from accel.compression.levels.assemble import mixed_output, write_mixed
from accel.compression.levels.database import LevelDatabase
from accel.compression.levels.level import KEEP
from accel.compression.levels.units import layer_levels, make_units
from accel.compression.quantizers.base import Scheme
from accel.compression.settings import Task
from accel.errors import UserError
from accel.models.architecture import Architecture
from accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

LEVELS = tuple(Scheme(bits, 32, symmetric=True) for bits in (2, 3, 4))
TOKENS = tiny.tokens(4, 16)


def make(folder, family):
    """Architecture and finished level database of a tiny checkpoint."""
    source = tiny.save(folder / "original", family, dtype=torch.bfloat16)
    chosen = local.settings(source, folder / "levels", levels=LEVELS, scheme=LEVELS[1])
    local.compress(chosen, TOKENS)
    architecture = Task(chosen).architecture
    return architecture, LevelDatabase.read(chosen.output, architecture)


@pytest.fixture(scope="module", params=["llama", "opt", "phi3"])
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


def mixture(database):
    """A level for every layer, all of them in use, and one layer left alone."""
    names = [layer.name for groups in database.plan for group in groups for layer in group.layers]
    levels = {name: [*database.levels, KEEP][index % 4] for index, name in enumerate(names)}
    assert set(levels.values()) == {*database.levels, KEEP}
    return levels


def test_transformers_loads_the_mixture_and_computes_what_its_layers_stand_for(made, tmp_path):
    architecture, database = made
    levels = mixture(database)
    output = mixed_output(architecture, database, levels, tmp_path / "out")
    output.open({}, overwrite=False)
    facts = write_mixed(output, database, levels)
    assert {row["layer"]: row["level"] for row in facts} == {k: v for k, v in levels.items() if v != KEEP}
    compressed = Checkpoint(tmp_path / "out")
    for name, level in levels.items():
        expected = architecture.checkpoint.tensor(f"{name}.weight") if level == KEEP else database.weight(name, level)
        assert torch.equal(compressed.tensor(f"{name}.weight"), expected)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        loaded(TOKENS, use_cache=False)  # some weights are unpacked at the first use
        found = torch.nn.Module.float(loaded)(TOKENS, use_cache=False).logits
    mixed = Architecture(compressed)
    hidden = mixed.embed(TOKENS)
    for block in range(mixed.num_blocks):
        hidden = mixed.run_block(mixed.load_block(block), block, hidden)
    # The weights are the same numbers; float32 sums of another order are left.
    torch.testing.assert_close(found, mixed.head(hidden), rtol=1e-3, atol=2e-4)


def test_a_stopped_writing_goes_on_and_gives_the_same_bytes(made, tmp_path):
    architecture, database = made
    levels = mixture(database)
    for name in ("whole", "stopped"):
        output = mixed_output(architecture, database, levels, tmp_path / name)
        output.open({}, overwrite=False)
        write_mixed(output, database, levels)
    (tmp_path / "stopped" / "config.json").unlink()
    output.shard(1).unlink()
    write_mixed(mixed_output(architecture, database, levels, tmp_path / "stopped"), database, levels)
    assert local.contents(tmp_path / "stopped") == local.contents(tmp_path / "whole")


def test_units_count_the_bits_that_are_stored(made):
    _, database = made
    for unit in make_units(database, "none"):
        for choice in unit.choices:
            assert choice.bits == database.facts(unit.name)[choice.level]["stored_bits"]
            assert choice.error == database.facts(unit.name)[choice.level]["error"]


def test_serving_joins_the_layers_that_servers_fuse(tmp_path):
    _, database = make(tmp_path, "llama")
    units = make_units(database, "serving")
    assert [len(unit.layers) for unit in units] == [3, 1, 2, 1] * 2
    levels = layer_levels(units, {unit.name: unit.choices[number % 3].level for number, unit in enumerate(units)})
    start = "model.layers.0.self_attn"
    assert levels[f"{start}.q_proj"] == levels[f"{start}.k_proj"] == levels[f"{start}.v_proj"]
    assert len(levels) == 14


def test_experts_of_all_blocks_get_one_level_or_are_refused(tmp_path):
    architecture, database = make(tmp_path, "mixtral")
    units = make_units(database, "none")
    experts = [unit for unit in units if unit.kind == "experts"]
    assert len(experts) == 1
    assert len(experts[0].layers) == 2 * 4 * 3
    levels = {layer: "w2g32" for unit in units for layer in unit.layers}
    levels[experts[0].layers[0]] = "w4g32"
    with pytest.raises(UserError, match=r"experts got several levels \(w2, w4\)"):
        mixed_output(architecture, database, levels, tmp_path / "out")
