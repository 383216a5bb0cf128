from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, DROP, MLP, size
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.depth import dropped_bits, part_of
from hasten.accel.compression.levels.level import KEEP, make_levels
from hasten.accel.compression.levels.units import dropped_parts, layer_levels, make_units
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.search.candidates import Candidates
from hasten.accel.compression.search.fitness import Perplexity
from hasten.accel.compression.search.samples import Sample
from hasten.accel.errors import UserError
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

LEVELS = make_levels([2, 3, 4], [32], True)
TOKENS = tiny.tokens(4, 16)


def make(folder, family):
    """Architecture and finished level database of a tiny checkpoint."""
    source = tiny.save(folder / "original", family, dtype=torch.bfloat16)
    chosen = local.settings(source, folder / "levels", levels=LEVELS, level=LEVELS[1])
    local.compress(chosen, TOKENS)
    architecture = Task(chosen).architecture
    return architecture, LevelDatabase.read(chosen.output, architecture)


@pytest.fixture(scope="module", params=["llama", "opt", "phi3"])
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


def mixture(database):
    """A level for every layer, with all levels in use and one layer uncompressed."""
    names = [layer.name for groups in database.layer_groups for group in groups for layer in group.layers]
    levels = {name: [*database.levels, KEEP][index % 4] for index, name in enumerate(names)}
    assert set(levels.values()) == {*database.levels, KEEP}
    return levels


def test_transformers_loads_the_mixture_and_computes_with_its_unpacked_layers(made, tmp_path):
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
    check_loads(tmp_path / "out")


def check_loads(folder):
    """Compare the logits of transformers alone with those of our own reader."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        loaded(TOKENS, use_cache=False)  # some weights are unpacked at the first use
        found = torch.nn.Module.float(loaded)(TOKENS, use_cache=False).logits
    mixed = Architecture(Checkpoint(folder))
    hidden = mixed.embed(TOKENS)
    for block in range(mixed.num_blocks):
        hidden = mixed.run_block(mixed.load_block(block), block, hidden)
    # The weights are equal; only the order of float32 sums differs.
    torch.testing.assert_close(found, mixed.head(hidden), rtol=1e-3, atol=2e-4)


def test_an_interrupted_write_resumes_to_the_same_bytes(made, tmp_path):
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_layers_next_to_experts_have_levels_of_their_own(tmp_path, family):
    architecture, database = make(tmp_path, family)
    levels = {name: "w3g32" if ".experts." in name else level for name, level in mixture(database).items()}
    output = mixed_output(architecture, database, levels, tmp_path / "out")
    output.open({}, overwrite=False)
    write_mixed(output, database, levels)
    check_loads(tmp_path / "out")


def test_experts_of_all_blocks_get_one_level_or_are_refused(tmp_path):
    architecture, database = make(tmp_path, "mixtral")
    units = make_units(database, "none")
    experts = [unit for unit in units if unit.kind == "experts"]
    assert len(experts) == 1
    assert len(experts[0].layers) == 2 * 4 * 3
    levels = {layer: "w2g32" for unit in units for layer in unit.layers}
    levels[experts[0].layers[0]] = "w4g32"
    with pytest.raises(UserError, match=r"experts got several levels \(w2g32, w4g32\)"):
        mixed_output(architecture, database, levels, tmp_path / "out")


ATTENTION_ONLY, MLP_ONLY, WHOLE, BOTH = {ATTENTION}, {MLP}, {BLOCK}, {ATTENTION, MLP}
DROPPED = {0: WHOLE, 1: ATTENTION_ONLY, 3: BOTH, 4: MLP_ONLY}
# Of six blocks 1, 2, 4 and 5 stay. Both kinds of Gemma's windows and of Qwen's blocks are among them.
TYPES = ["full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2, "sliding_attention"]
CHANGES = {
    "gemma2": {"layer_types": TYPES},
    "gemma3_text": {"layer_types": TYPES},
    "qwen2": {"use_sliding_window": True, "sliding_window": tiny.WINDOW, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": tiny.WINDOW, "max_window_layers": 2},
}


def six_blocks(folder, family, ignore=(), **changes):
    """Architecture and level database, rounded to nearest, of a checkpoint of six blocks."""
    changes = {"num_hidden_layers": 6} | CHANGES.get(family, {}) | changes
    source = tiny.save(folder / "original", family, dtype=torch.bfloat16, **changes)
    chosen = local.settings(source, folder / "levels", RoundToNearest(), levels=LEVELS, level=LEVELS[1], ignore=ignore)
    local.compress(chosen, TOKENS)
    architecture = Task(chosen).architecture
    return architecture, LevelDatabase.read(chosen.output, architecture)


def dropping_mixture(database):
    """Levels of all kinds; in mixtures one level for all experts, and the other layers uncompressed."""
    if any(group.is_expert for groups in database.layer_groups for group in groups):
        layers = [(group, layer) for groups in database.layer_groups for group in groups for layer in group.layers]
        return {layer.name: "w3g32" if group.is_expert else KEEP for group, layer in layers}
    return mixture(database)


def run(architecture, dropped=None, weights=None):
    """Logits block by block. weights: replacements by layer. dropped: parts whose output is zeroed or not computed."""
    hidden = architecture.embed(TOKENS)
    for index in range(architecture.num_blocks):
        kinds = (dropped or {}).get(index, set())
        if BLOCK in kinds:
            continue
        block = architecture.load_block(index)
        for layer in architecture.linears(index):
            if layer.name in (weights or {}):
                block.get_submodule(layer.module).weight.data = weights[layer.name].float()
        for path in [*(["self_attn"] if ATTENTION in kinds else []), *(["mlp", "fc2"] if MLP in kinds else [])]:
            if hasattr(block, path):
                getattr(block, path).register_forward_hook(no_output)
        hidden = architecture.run_block(block, index, hidden)
    return architecture.head(hidden)


def no_output(module, inputs, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def weights_of(database, levels):
    return {name: database.weight(name, level) for name, level in levels.items() if level != KEEP}


def load(folder):
    """The model loaded by transformers alone, without missing or unexpected tensors."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        model(TOKENS, use_cache=False)  # some weights are unpacked at the first use
        return torch.nn.Module.float(model)(TOKENS, use_cache=False).logits


def write(architecture, database, levels, path, dropped):
    output = mixed_output(architecture, database, levels, path, dropped)
    output.open({}, overwrite=False)
    return write_mixed(output, database, levels)


def check(architecture, database, levels, path, dropped):
    """Write the mixture, and compare the loaded model with the original without the dropped parts."""
    facts = write(architecture, database, levels, path, dropped)
    expected = run(architecture, dropped, weights_of(database, levels))
    # The weights are equal; only the order of float32 sums differs.
    for found in (run(Architecture(Checkpoint(path))), load(path)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    return facts


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_runs_what_is_left_when_blocks_and_parts_of_blocks_are_dropped(tmp_path, family):
    architecture, database = six_blocks(tmp_path, family)
    facts = check(architecture, database, dropping_mixture(database), tmp_path / "out", DROPPED)
    left = Checkpoint(tmp_path / "out")
    assert left.config["num_hidden_layers"] == 4
    assert {Path(name).name for name in (tmp_path / "out").glob("*.safetensors")} == {
        f"model-{number + 1:05d}-of-00005.safetensors" for number in range(5)
    }
    # The report gives the stored bits.
    taken = sum(left.stored_bytes(name) for name in left.names if left.quantization(name) is not None)
    assert sum(row["stored_bits"] for row in facts) == 8 * taken
    assert sizes(left).stored_bytes == taken
    rows = {row["layer"]: row for row in facts}
    for block in range(6):
        for layer in architecture.linears(block):
            row = rows.get(layer.name)
            if block in (0, 3):
                assert (row["level"], row["stored_bits"]) == ("drop", 0)
            elif part_of(layer) in DROPPED.get(block, ()):
                assert row["level"] == "drop"
                assert row["error"] == 1
                assert row["stored_bits"] == dropped_bits([layer], architecture.checkpoint, LEVELS[1])
            assert row is None or (row["block"], row["weights"]) == (block, layer.rows * layer.columns)


def test_dropped_experts_are_plain_zeros_where_the_others_are_plain(tmp_path):
    architecture, database = six_blocks(tmp_path, "mixtral", num_hidden_layers=3)
    facts = check(architecture, database, {}, tmp_path / "out", {0: WHOLE, 1: MLP_ONLY})
    left = Checkpoint(tmp_path / "out")
    assert "quantization_config" not in left.config
    assert not left.tensor("model.layers.0.block_sparse_moe.experts.2.w1.weight").any()
    assert left.tensor("model.layers.0.block_sparse_moe.gate.weight").any()
    zeros = [row for row in facts if row["block"] == 1]
    assert {row["bits"] for row in zeros} == {16}
    experts = [layer for layer in architecture.linears(1) if layer.expert is not None]
    assert sum(row["stored_bits"] for row in zeros) == dropped_bits(experts, architecture.checkpoint, None)


def test_plain_experts_next_to_quantized_layers_are_refused(tmp_path):
    architecture, database = six_blocks(tmp_path, "mixtral", num_hidden_layers=2)
    attention = database.layer_groups[0][0].layers[0].name
    for levels, dropped in (({attention: "w2g32"}, {}), ({}, {1: ATTENTION_ONLY})):
        with pytest.raises(UserError, match="experts got no level of quantization"):
            mixed_output(architecture, database, levels, tmp_path / "out", dropped)


def test_dropped_experts_have_the_cheapest_form_where_no_others_are_left(tmp_path):
    architecture, database = six_blocks(tmp_path, "qwen3_moe", num_hidden_layers=2)
    facts = check(architecture, database, {}, tmp_path / "out", {1: MLP_ONLY})
    assert {row["bits"] for row in facts} == {2}


def test_plain_blocks_without_some_of_their_number_have_no_quantization_config(tmp_path):
    architecture, database = six_blocks(tmp_path, "llama")
    facts = check(architecture, database, {}, tmp_path / "out", {1: WHOLE, 4: WHOLE})
    left = Checkpoint(tmp_path / "out")
    assert not left.is_compressed
    assert "quantization_config" not in left.config
    assert {row["block"] for row in facts} == {1, 4}
    assert sizes(left).weights == 0
    for name in architecture.block_tensors(5):
        assert torch.equal(left.tensor(name.replace("layers.5.", "layers.3.")), architecture.checkpoint.tensor(name))


@pytest.mark.parametrize("ignore", [["o_proj$", "fc2$"], ["q_proj$", "k_proj$", "v_proj$", "fc1$"], ["layers.1."]])
def test_parts_whose_layers_were_ignored_are_dropped_all_the_same(tmp_path, ignore):
    ignored = ["out_proj$" if name == "o_proj$" else name for name in ignore]
    architecture, database = six_blocks(tmp_path, "opt", ignored, num_hidden_layers=3)
    check(architecture, database, mixture(database), tmp_path / "out", {1: MLP_ONLY, 2: ATTENTION_ONLY})


def test_norms_of_the_sum_stay_when_both_parts_of_a_block_are_dropped(tmp_path):
    architecture, database = six_blocks(tmp_path, "opt", num_hidden_layers=3, do_layer_norm_before=False)
    check(architecture, database, mixture(database), tmp_path / "out", {0: BOTH, 2: WHOLE})


def test_a_search_scores_the_model_that_is_written(tmp_path):
    architecture, database = six_blocks(tmp_path, "llama")
    units = make_units(database, "none", drop=[ATTENTION, MLP, BLOCK])
    wanted = {0: WHOLE, 1: ATTENTION_ONLY, 4: MLP_ONLY}
    assignment = {unit.name: unit.choices[-1].level for unit in units}
    for unit in units:
        if not unit.layers and unit.kind in wanted.get(unit.block, ()):
            assignment[unit.name] = DROP
    levels, dropped = layer_levels(units, assignment), dropped_parts(units, assignment)
    assert dropped == wanted
    write(architecture, database, levels, tmp_path / "out", dropped)
    genome = tuple(unit.index(assignment[unit.name]) for unit in units)
    candidates = Candidates(architecture, units, database.weight, TOKENS, Perplexity())
    logits = run(Architecture(Checkpoint(tmp_path / "out")))[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    sample = Sample(tuple((number, TOKENS.shape[1]) for number in range(len(TOKENS))))
    assert candidates.evaluate([genome], sample)[0] == pytest.approx(float(expected), rel=1e-4)
    # The search counts the stored bits.
    left = Checkpoint(tmp_path / "out")
    assert size(units, genome) == 8 * sizes(left).stored_bytes


def test_an_interrupted_write_with_dropped_parts_resumes_to_the_same_bytes(tmp_path):
    architecture, database = six_blocks(tmp_path, "llama")
    levels = mixture(database)
    facts = write(architecture, database, levels, tmp_path / "whole", DROPPED)
    output = mixed_output(architecture, database, levels, tmp_path / "stopped", DROPPED)
    output.open({}, overwrite=False)

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mixed(output, database, levels, stop)
    assert output.finished == [1, 2]
    assert not output.is_complete
    times = {block: output.shard(block).stat().st_mtime_ns for block in output.finished}
    again = mixed_output(architecture, database, levels, tmp_path / "stopped", DROPPED)
    again.open({}, overwrite=False)
    assert write_mixed(again, database, levels) == facts
    assert local.contents(tmp_path / "stopped") == local.contents(tmp_path / "whole")
    assert times == {block: again.shard(block).stat().st_mtime_ns for block in times}


def test_pruned_layers_are_stored_dense_and_count_as_untouched(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)
    both = make_levels([3], [32], True, [0.5])
    chosen = local.settings(
        source, tmp_path / "levels", RoundToNearest(), levels=both, level=LEVELS[1], pruner=Magnitude()
    )
    local.compress(chosen, TOKENS)
    architecture = Task(chosen).architecture
    database = LevelDatabase.read(chosen.output, architecture)
    names = [layer.name for groups in database.layer_groups for group in groups for layer in group.layers]
    levels = {name: ("s50", "w3g32")[index % 2] for index, name in enumerate(names)}
    facts = check(architecture, database, levels, tmp_path / "out", {1: ATTENTION_ONLY})
    pruned = [name for name in names if levels[name] == "s50" and ".1.self_attn." not in name]
    left = Checkpoint(tmp_path / "out")
    assert set(pruned) <= set(left.config["quantization_config"]["ignore"])
    for name in pruned:
        assert torch.equal(left.tensor(f"{name}.weight"), database.weight(name, "s50"))
    assert [row["layer"] for row in facts] == names
    write(architecture, database, dict.fromkeys(names, "s50"), tmp_path / "sparse", {})
    assert "quantization_config" not in Checkpoint(tmp_path / "sparse").config


def test_experts_of_which_some_stay_plain_are_refused(tmp_path):
    architecture, database = six_blocks(tmp_path, "mixtral", num_hidden_layers=2)
    levels = {layer.name: "w2g32" for group in database.layer_groups[0] for layer in group.layers}
    with pytest.raises(UserError, match=r"experts got several levels \(none, w2g32\)"):
        mixed_output(architecture, database, levels, tmp_path / "out")
    # Zeros fit any level.
    check(architecture, database, levels, tmp_path / "out", {1: MLP_ONLY})


def test_zeros_next_to_zero_points_are_refused_and_fewer_blocks_are_not(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", dtype=torch.bfloat16)
    levels = make_levels([4], [32], False)
    chosen = local.settings(source, tmp_path / "levels", RoundToNearest(), levels=levels, level=levels[0])
    local.compress(chosen, TOKENS)
    architecture = Task(chosen).architecture
    database = LevelDatabase.read(chosen.output, architecture)
    levels = {layer.name: "w4g32a" for groups in database.layer_groups for group in groups for layer in group.layers}
    with pytest.raises(UserError, match="cannot be dropped next to levels with zero points"):
        mixed_output(architecture, database, levels, tmp_path / "out", {1: MLP_ONLY})
    check(architecture, database, levels, tmp_path / "out", {1: WHOLE})


def test_levels_that_the_database_lacks_are_refused(made, tmp_path):
    architecture, database = made
    name = database.layer_groups[0][0].layers[0].name
    with pytest.raises(ValueError, match=r"level w7g32 of .* is none of keep, w2g32, w3g32, w4g32"):
        mixed_output(architecture, database, {name: "w7g32"}, tmp_path / "out")
