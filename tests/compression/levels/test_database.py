import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.compression.calibration import slabs
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.formats import columns
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.kinds.column_bits import ColumnBitsLevel
from hasten.accel.compression.levels.level import make_levels, parse_level
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.compression.quantizers.baq import ColumnwiseBAQ
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

LEVELS = make_levels([2, 3, 4, 5, 6], [32], True)
TOKENS = tiny.tokens(8, 16)


def settings(source, output, **changes):
    return local.settings(source, output, levels=LEVELS, level=LEVELS[1], **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def database(source, tmp_path_factory):
    chosen = settings(source, tmp_path_factory.mktemp("levels") / "levels")
    local.compress(chosen, TOKENS)
    task = Task(chosen)
    return LevelDatabase.read(chosen.output, task.architecture)


def layers(database):
    return [layer.name for groups in database.layer_groups for group in groups for layer in group.layers]


def test_the_propagated_level_is_what_compress_makes_at_that_level(database, source, tmp_path):
    local.compress(local.settings(source, tmp_path / "out", level=LEVELS[1]), TOKENS)
    compressed = Checkpoint(tmp_path / "out")
    for layer in layers(database):
        assert torch.equal(database.weight(layer, "w3g32"), compressed.tensor(f"{layer}.weight"))


@pytest.mark.parametrize(("propagate", "groups"), [("sequential", 1), ("quantized", 4)])
def test_what_no_propagated_level_reaches_is_what_compress_makes_at_every_level(propagate, groups, source, tmp_path):
    chosen = settings(source, tmp_path / "levels", propagate=propagate)
    local.compress(chosen, TOKENS)
    database = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    for level in LEVELS:
        output = tmp_path / level.name
        local.compress(local.settings(source, output, level=level, propagate=propagate), TOKENS)
        compressed = Checkpoint(output)
        for group in database.layer_groups[0][:groups]:
            for layer in group.layers:
                weight = database.weight(layer.name, level.name)
                assert torch.equal(weight, compressed.tensor(f"{layer.name}.weight"))


def test_more_bits_make_less_error_and_facts_count_what_is_stored(database):
    for layer in layers(database):
        rows = list(database.facts(layer).values())
        assert [row["level"] for row in rows] == database.levels
        for fewer, more in itertools.pairwise(rows):
            assert more["squared_error"] < fewer["squared_error"]
            assert more["stored_bits"] > fewer["stored_bits"]
        for row in rows:
            parts = database.parts(layer, row["level"])
            # Packed words hold whole codes of rows whose length they divide here, so nothing is lost between them.
            packed = 8 * sum(parts[part].nbytes for part in ("weight_packed", "weight_scale"))
            assert row["stored_bits"] <= packed <= 1.1 * row["stored_bits"]


def test_layers_that_are_missing_are_made_again_and_no_others(source, tmp_path):
    chosen = settings(source, tmp_path / "levels")
    local.compress(chosen, TOKENS)
    whole = local.contents(tmp_path / "levels")
    (tmp_path / "levels" / "database.json").unlink()
    files = sorted((tmp_path / "levels" / "layers").iterdir())
    files[3].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    task = Task(chosen)
    assert [group.block for block in range(2) for group in task.output.unfinished(block)] == [0]
    local.compress(chosen, TOKENS)
    assert local.contents(tmp_path / "levels") == whole
    # The layers that share an input with it are solved with it.
    group = next(group for group in task.layer_groups[0] if any(layer.name == files[3].stem for layer in group.layers))
    again = {layer.name for layer in group.layers}
    assert {file.stem for file, time in kept.items() if file.stat().st_mtime_ns != time} == again - {files[3].stem}


def test_a_database_of_another_checkpoint_is_refused(database, tmp_path):
    other = Task(
        local.settings(
            tiny.save(tmp_path / "other", "llama", rms_norm_eps=1e-3, dtype=torch.bfloat16), tmp_path / "out"
        )
    )
    with pytest.raises(UserError, match=r"was made from another checkpoint than model=.*other"):
        LevelDatabase.read(database.path, other.architecture)


def test_a_folder_without_a_finished_database_is_refused(source, tmp_path):
    chosen = settings(source, tmp_path / "levels")
    task = Task(chosen)
    with pytest.raises(UserError, match=r"levels=.* is no level database"):
        LevelDatabase.read(tmp_path / "nothing", task.architecture)
    task.output.open({}, overwrite=False)
    with pytest.raises(UserError, match=r"levels=.* is not finished: run hasten levels again"):
        LevelDatabase.read(chosen.output, task.architecture)


def test_a_reference_that_is_no_level_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"reference=w8g32 is none of the levels w2g32, w3g32"):
        local.settings(source, tmp_path / "levels", levels=LEVELS, scheme=Scheme(8, 32, symmetric=True))


def test_a_database_names_its_levels_and_layers(database):
    content = json.loads((database.path / "database.json").read_text())
    assert content["levels"] == ["w2g32", "w3g32", "w4g32", "w5g32", "w6g32"]
    assert content["layers"] == layers(database)


def test_sparse_levels_stand_beside_quantized_ones(source, tmp_path):
    levels = make_levels([3], [32], True, [0.5])
    chosen = local.settings(
        source, tmp_path / "levels", levels=levels, level=levels[0], pruner=SparseGPT(), dtype=torch.float32
    )
    local.compress(chosen, TOKENS)
    found = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    assert found.levels == ["w3g32", "s50"]
    for group in found.layer_groups[0]:
        for layer in group.layers:
            weight = found.weight(layer.name, "s50")
            assert weight.dtype == torch.bfloat16
            assert int((weight == 0).sum()) >= weight.numel() // 2
            assert torch.equal(found.checkpoint_tensors(layer.name, "s50")["weight"], weight)
            facts = found.facts(layer.name)
            for name, level in found.levels_of(group):
                assert facts[name]["stored_bits"] == found.stored_bits(group, layer, level)
                assert 0 < facts[name]["error"] < 1
            assert facts["s50"]["sparsity"] == 0.5
            assert (facts["w3g32"]["method"], facts["s50"]["method"]) == ("GPTQ", "SparseGPT")
            stored = found.parts(layer.name, "s50")
            assert 8 * (stored["mask"].nbytes + stored["values"].nbytes) == facts["s50"]["stored_bits"]


def test_blocks_are_calibrated_on_the_sparse_level_where_there_is_no_other(source, tmp_path):
    errors = []
    for name, fractions in (("low", (0.75, 0.5)), ("high", (0.75, 0.25))):
        levels = make_levels([], [], True, fractions)
        chosen = local.settings(source, tmp_path / name, levels=levels, level=levels[-1], pruner=Wanda())
        rows = local.compress(chosen, TOKENS)
        errors.append({row["layer"]: row["squared_error"] for row in rows if row["level"] == "s75"})
    first = "model.layers.0.self_attn.q_proj"
    assert errors[0][first] == errors[1][first]
    assert errors[0]["model.layers.1.self_attn.q_proj"] != errors[1]["model.layers.1.self_attn.q_proj"]


def test_a_database_may_have_no_level_at_all(source, tmp_path):
    chosen = local.settings(source, tmp_path / "levels", levels=(), pruner=Wanda())
    local.compress(chosen, TOKENS)
    found = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    assert found.levels == []
    assert len(layers(found)) == 14


THREE = make_levels([3], [32], True, [0.5], [3])


def by_columns(source, output, **changes):
    methods = {"pruner": SparseGPT(), "column_quantizer": ColumnwiseBAQ()}
    return local.settings(source, output, **({"levels": THREE, "level": THREE[0]} | methods | changes))


@pytest.fixture(scope="module")
def three(source, tmp_path_factory):
    """A database of a grid, of bits by column and of a sparsity."""
    chosen = by_columns(source, tmp_path_factory.mktemp("columns") / "levels")
    local.compress(chosen, TOKENS)
    return LevelDatabase.read(chosen.output, Task(chosen).architecture)


def test_bits_by_column_stand_beside_grids_and_sparsities(three):
    assert three.levels == ["w3g32", "c3", "s50"]
    for group in three.layer_groups[0] + three.layer_groups[1]:
        for layer in group.layers:
            facts = three.facts(layer.name)
            for name, level in three.levels_of(group):
                assert facts[name]["stored_bits"] == three.stored_bits(group, layer, level)
                assert 0 < facts[name]["error"] < 1
            assert [facts[name]["method"] for name in three.levels] == ["GPTQ", "ColumnwiseBAQ", "SparseGPT"]
            assert facts["c3"]["bits"] == 3
            assert sum(facts["c3"]["columns_of_bits"].values()) == layer.columns
            stored = three.parts(layer.name, "c3")
            taken = 8 * sum(tensor.nbytes for name, tensor in stored.items() if name != "weight_shape")
            assert facts["c3"]["stored_bits"] <= taken < facts["c3"]["stored_bits"] + 8 * len(stored)
            weight = three.weight(layer.name, "c3")
            assert weight.shape == (layer.rows, layer.columns)
            assert weight.dtype == torch.bfloat16
            assert torch.equal(three.checkpoint_tensors(layer.name, "c3")["weight"], weight)


def test_a_mixture_with_bits_by_column_is_loaded_by_transformers(three, source, tmp_path):
    architecture = Architecture(Checkpoint(source))
    levels = {name: three.levels[index % 3] for index, name in enumerate(layers(three))}
    output = mixed_output(architecture, three, levels, tmp_path / "out")
    output.open({}, overwrite=False)
    facts = write_mixed(output, three, levels)
    assert {row["layer"]: row["level"] for row in facts} == levels
    dense = {name for name, level in levels.items() if level != "w3g32"}
    assert dense <= set(Checkpoint(tmp_path / "out").config["quantization_config"]["ignore"])
    # The original with the weights that the levels stand for computes the same.
    loaded, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", source))
    for name, level in levels.items():
        original.get_submodule(name).weight.data = three.weight(name, level)
        if name in dense:
            assert torch.equal(loaded.get_submodule(name).weight, three.weight(name, level))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, original(TOKENS).logits)


def test_layers_that_share_an_input_have_maps_of_their_own_columns(three):
    maps = [columns.unpack(three.parts(layer.name, "c3")).widths for layer in three.layer_groups[0][0].layers]
    assert len(maps) == 3
    assert not torch.equal(maps[0], maps[1])
    assert all(int(one.sum()) == 3 * 64 for one in maps)


def test_bits_by_column_do_not_depend_on_what_else_is_solved(three, source, tmp_path):
    chosen = by_columns(source, tmp_path / "levels", levels=THREE[1:2], level=THREE[1], ignore=("q_proj",))
    local.compress(chosen, TOKENS)
    alone = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    # The inputs of all later layers depend on the level that is propagated.
    for layer in alone.layer_groups[0][0].layers:
        together = three.parts(layer.name, "c3")
        for name, tensor in alone.parts(layer.name, "c3").items():
            assert torch.equal(tensor, together[name])


def test_a_layer_in_pieces_has_one_map_for_all_its_rows(three, source, tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "_SLAB", 20 * 64)
    chosen = by_columns(source, tmp_path / "levels")
    local.compress(chosen, TOKENS)
    found = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    for layer in three.layer_groups[0][0].layers:
        cut, whole = (columns.unpack(one.parts(layer.name, "c3")) for one in (found, three))
        assert torch.equal(cut.widths, whole.widths)
        # Matrix products of other shapes may round the last bit another way.
        assert float((cut.codes != whole.codes).float().mean()) < 0.01


def test_blocks_are_calibrated_on_bits_by_column_where_there_is_nothing_else(source, tmp_path):
    errors = []
    for mean in (2.0, 8.0):
        levels = make_levels([], [], True, [], [1.5, mean])
        chosen = by_columns(source, tmp_path / str(mean), levels=levels, level=levels[-1])
        rows = local.compress(chosen, TOKENS)
        errors.append({row["layer"]: row["squared_error"] for row in rows if row["level"] == "c1.5"})
    first = "model.layers.0.self_attn.q_proj"
    assert errors[0][first] == errors[1][first]
    assert errors[0]["model.layers.1.self_attn.q_proj"] != errors[1]["model.layers.1.self_attn.q_proj"]


def test_experts_that_saw_too_few_tokens_get_bits_by_column_from_their_weights(tmp_path):
    mixture = tiny.save(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    chosen = by_columns(mixture, tmp_path / "levels", levels=THREE[1:2], level=THREE[1], expert_tokens=10**6)
    rows = [row for row in local.compress(chosen, TOKENS) if ".experts." in row["layer"]]
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        assert "fewer than 1000000: rounded to nearest" in row["notes"][0]
        assert row["bits"] == 3
        assert 0 < row["error"] < 0.1


def test_a_method_that_cannot_end_at_a_level_is_refused_before_anything_is_solved(source, tmp_path):
    chosen = by_columns(source, tmp_path / "levels")
    with pytest.raises(UserError, match=r"column_bits=3 is out of range: 4 to 8"):
        replace(chosen, column_quantizer=ColumnwiseBAQ(lowest=4))


def test_names_of_bits_by_column_are_read_back_to_the_last_digit():
    for mean, name in ((3.0, "c3"), (2.5, "c2.5"), (2.1234567891, "c2.1234567891")):
        assert ColumnBitsLevel(ColumnBits(mean)).name == name
        assert parse_level(name) == ColumnBitsLevel(ColumnBits(mean))
    levels = make_levels([4], [32], True, [0.5], [3, 2.5])
    assert [level.name for level in levels] == ["w4g32", "c2.5", "c3", "s50"]
    with pytest.raises(UserError, match=r"column_bits=\[3, 3\] is wrong: expected different values"):
        make_levels([4], [32], True, [], [3, 3])
    with pytest.raises(UserError, match=r"column_bits=9\.0 is out of range: 1 to 8"):
        parse_level("c9")


def test_levels_are_those_that_their_names_stand_for():
    levels = make_levels([3], [128], True, [1 / 3, 0.5], [2.5])
    assert [parse_level(level.name) for level in levels] == list(levels)
    assert [level.name for level in levels] == ["w3g128", "c2.5", "s50", "s33.3333"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_levels_of_the_group_size_auto_have_one_name_and_the_size_of_each_layer(tmp_path, symmetric):
    source = tiny.save(tmp_path / "model", "llama", dtype=torch.bfloat16)
    levels = make_levels([2, 4], ["auto"], symmetric)
    chosen = local.settings(source, tmp_path / "levels", levels=levels, level=levels[1])
    rows = local.compress(chosen, tiny.tokens(4, 16))
    database = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    # transformers reads one grid for all layers with zero points.
    assert database.levels == (["w2gauto", "w4gauto"] if symmetric else ["w2g64a", "w4g64a"])
    for row in rows:
        assert row["group_size"] == (128 if symmetric and row["layer"].endswith("down_proj") else 64)
    for groups in database.layer_groups:
        for group in groups:
            for layer in group.layers:
                for name, level in database.levels_of(group):
                    size = 128 if symmetric and layer.columns == 128 else 64
                    assert level.loader_scheme.weights == Scheme(level.scheme.bits, size, symmetric)
                    assert database.weight(layer.name, name).shape == (layer.rows, layer.columns)
                    stored = database.facts(layer.name)[name]["stored_bits"]
                    assert stored == database.stored_bits(group, layer, level)


def test_a_size_that_all_layers_share_is_named(tmp_path):
    source = tiny.save(tmp_path / "model", "llama", dtype=torch.bfloat16)
    levels = make_levels([2, 4], ["auto", 64], True)
    chosen = local.settings(source, tmp_path / "levels", levels=levels, level=levels[2], ignore=("down_proj",))
    local.compress(chosen, tiny.tokens(4, 16))
    assert LevelDatabase.read(chosen.output, Task(chosen).architecture).levels == ["w2g64", "w4g64"]
