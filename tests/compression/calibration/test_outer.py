"""Output layer and embedding in fewer bits: tied or not, calibrated, in tiles, resumed, and in exactly their bytes."""

from pathlib import Path

import pytest
import torch

from hasten.accel.compression.calibration import outer_solve
from hasten.accel.compression.calibration.outer import make_outer_levels
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

TOKENS = tiny.tokens(4)
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def settings(source: Path, output: Path, head: list[int], embedding: list[int], **changes):
    outer = make_outer_levels(head, embedding, 32, 32)
    values = {"scheme": Scheme(4, 32, symmetric=True), "outer": outer, "propagate": "original"}
    return local.settings(source, output, **(values | changes))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("untied") / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "model"
    return tiny.save(folder, "llama", dtype=torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def compressed(untied, tmp_path_factory):
    """An untied checkpoint with 4-bit output layer and 6-bit embedding, and the facts of all layers."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    rows = local.compress(settings(untied, output, [4], [6]), TOKENS)
    return Checkpoint(output), {row["layer"]: row for row in rows}


def last_inputs(source):
    """Inputs (tokens, D) of the original's output layer."""
    model = Architecture(Checkpoint(source))
    hidden = model.embed(TOKENS)
    for block in range(model.num_blocks):
        hidden = model.run_block(model.load_block(block), block, hidden)
    return model.output_layer().inputs(hidden).flatten(0, 1)


def test_facts_state_the_bytes_on_disk_and_the_sizes_with_and_without(compressed):
    checkpoint, facts = compressed
    for name, bits in ((HEAD, 4), (EMBEDDING, 6)):
        row = facts[name]
        assert (row["bits"], row["symmetric"]) == (bits, True)
        assert row["stored_bits"] == 8 * checkpoint.stored_bytes(f"{name}.weight")
        assert row["bits_per_weight"] == bits + 16 / 32
    found = sizes(checkpoint)
    inside = [row for name, row in facts.items() if name not in (HEAD, EMBEDDING)]
    assert found.block_bits_per_weight == sum(row["stored_bits"] for row in inside) / sum(
        row["weights"] for row in inside
    )
    assert found.bits_per_weight == sum(row["stored_bits"] for row in facts.values()) / sum(
        row["weights"] for row in facts.values()
    )


def test_the_error_of_the_output_layer_is_that_of_its_outputs_and_less_than_by_rounding(untied, compressed):
    checkpoint, facts = compressed
    inputs, weight = last_inputs(untied), Checkpoint(untied).tensor(f"{HEAD}.weight")
    outputs = inputs @ weight.float().T

    def error(changed):
        return float((inputs @ changed.float().T - outputs).square().sum() / outputs.square().sum())

    found = error(checkpoint.tensor(f"{HEAD}.weight"))
    # The Hessian is summed in float32.
    assert facts[HEAD]["error"] == pytest.approx(found, rel=1e-3)
    assert (facts[HEAD]["error_of"], facts[HEAD]["method"]) == ("output", "GPTQ")
    nearest = RoundToNearest(search=24, shrink=0.4).quantize(weight, None, Scheme(4, 32, symmetric=True))
    assert found < 0.9 * error(nearest.weight.dequantize())


def test_the_embedding_is_rounded_to_the_grids_of_least_squared_error(untied, compressed):
    checkpoint, facts = compressed
    weight = Checkpoint(untied).tensor(f"{EMBEDDING}.weight")
    scheme = Scheme(6, 32, symmetric=True)
    searched, plain = (
        RoundToNearest(search=search, shrink=0.4).quantize(weight, None, scheme).weight.dequantize()
        for search in (24, 0)
    )
    stored = checkpoint.tensor(f"{EMBEDDING}.weight")
    assert torch.equal(stored, searched)
    assert (stored - weight).float().square().sum() < (plain - weight).float().square().sum()
    assert (facts[EMBEDDING]["error_of"], facts[EMBEDDING]["tokens"]) == ("weights", 0)


def test_rows_of_a_packed_matrix_are_read_alone(compressed):
    checkpoint, _ = compressed
    for name in (f"{HEAD}.weight", f"{EMBEDDING}.weight"):
        whole, index = checkpoint.tensor(name), torch.tensor([5, 90, 5, 6, 7])
        assert torch.equal(checkpoint.rows(name, index), whole[index])
        assert torch.equal(checkpoint.row_range(name, 3, 60), whole[3:60])
    model = Architecture(checkpoint)
    held, streamed = model.output_layer(), model.streamed_output_layer()
    assert torch.equal(held.weight(10, 50), streamed.weight(10, 50))


def test_tiles_of_rows_change_no_code(untied, compressed, tmp_path, monkeypatch):
    checkpoint, facts = compressed
    monkeypatch.setattr(outer_solve, "slab_of", lambda device: 7 * 64)
    rows = local.compress(settings(untied, tmp_path / "out", [4], [6]), TOKENS)
    tiled = Checkpoint(tmp_path / "out")
    assert torch.equal(tiled.tensor(f"{EMBEDDING}.weight"), checkpoint.tensor(f"{EMBEDDING}.weight"))
    # Products of other shapes may round differently, so a value halfway between two codes may get the other one.
    changed = tiled.tensor(f"{HEAD}.weight") != checkpoint.tensor(f"{HEAD}.weight")
    assert changed.float().mean() < 0.01
    for row in rows:
        assert row["error"] == pytest.approx(facts[row["layer"]]["error"], rel=0.01)


def test_a_tied_pair_is_one_tensor_by_either_option(tied, tmp_path):
    made = []
    for number, (head, embedding) in enumerate((([6], []), ([], [6]), ([6], [6]))):
        output = tmp_path / str(number)
        rows = local.compress(settings(tied, output, head, embedding), TOKENS)
        assert [row["layer"] for row in rows if "layers." not in row["layer"]] == [EMBEDDING]
        made.append(Checkpoint(output))
    names = [name for name in made[0].names if "layers." not in name]
    assert names == [f"{EMBEDDING}.weight", "model.norm.weight"]
    for checkpoint in made[1:]:
        assert torch.equal(checkpoint.tensor(names[0]), made[0].tensor(names[0]))


def test_a_tied_pair_refuses_two_levels(tied, tmp_path):
    with pytest.raises(UserError, match=r"head_bits and embedding_bits give the levels w8g32 and w4g32"):
        local.compress(settings(tied, tmp_path / "out", [8], [4]), TOKENS)


def test_a_group_size_that_does_not_divide_the_columns_is_refused(untied, tmp_path):
    outer = make_outer_levels([8], [], 48, 48)
    with pytest.raises(UserError, match=r"group_size=48 does not divide the 64 columns of lm_head"):
        local.compress(settings(untied, tmp_path / "out", [], [], outer=outer), TOKENS)


@pytest.mark.parametrize("propagate", ["original", "sequential"])
def test_a_run_killed_behind_any_block_resumes_with_the_same_bytes(untied, tmp_path, propagate):
    chosen = settings(untied, tmp_path / "out", [4], [8], propagate=propagate)
    local.compress(chosen, TOKENS)
    whole = local.contents(tmp_path / "out")
    shards = sorted(path for path in (tmp_path / "out").glob("model-*.safetensors"))
    # The last shard holds output layer and embedding, the one before it the last block.
    for lost in (shards[-1:], shards[-2:]):
        for path in (*lost, tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors.index.json"):
            path.unlink()
        local.compress(chosen, TOKENS)
        assert local.contents(tmp_path / "out") == whole


def test_without_statistics_both_are_rounded(untied, tmp_path):
    chosen = settings(untied, tmp_path / "out", [8], [8], quantizer=RoundToNearest())
    rows = [row for row in local.compress(chosen, TOKENS) if "layers." not in row["layer"]]
    assert [(row["layer"], row["method"]) for row in rows] == [(HEAD, "RoundToNearest"), (EMBEDDING, "RoundToNearest")]
    assert max(row["error"] for row in rows) < 1e-4


def test_a_database_holds_the_levels_of_both_and_opens_again(untied, tmp_path):
    levels = (parse_level("w2g32"), parse_level("w4g32"))
    chosen = settings(untied, tmp_path / "levels", [4, 8], [6], levels=levels, level=levels[1])
    local.compress(chosen, TOKENS)
    architecture = Architecture(Checkpoint(untied))
    database = LevelDatabase.read(tmp_path / "levels", architecture)
    by_layer = {group.key: [name for name, _ in database.levels_of(group)] for group in database.layer_groups[-1]}
    assert by_layer == {HEAD: ["w4g32", "w8g32"], EMBEDDING: ["w6g32"]}
    assert set(database.facts(HEAD)) == {"w4g32", "w8g32"}
    original = architecture.checkpoint.tensor(f"{HEAD}.weight").float()
    errors = [float((database.weight(HEAD, name).float() - original).square().mean()) for name in by_layer[HEAD]]
    assert errors[1] < 0.02 * errors[0]
