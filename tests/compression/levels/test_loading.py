"""Checkpoints of every packing, as transformers loads them and as hasten reads them."""

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import KEEP, make_levels, parse_level
from hasten.accel.compression.levels.units import make_units
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.packed import needs_loader
from tests.compression import local
from tests.models import tiny

METHOD = "compressed-tensors"
TOKENS = tiny.tokens(2, 16)
# Of every packing, strategy and rounding of inputs one.
NAMES = ["fp8", "fp8_static", "fp8_block", "fp8a16", "w8a8", "w8a8s", "w4g128afp8", "mxfp8", "mxfp4", "nvfp4"]


@pytest.fixture
def alone(monkeypatch):
    """transformers as it is without hasten."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)


@pytest.fixture
def loader(alone, monkeypatch):
    module = importlib.import_module("hasten.accel.models.transformers_loader")
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, module.Loader)


def source(folder, family="llama", dtype=torch.bfloat16):
    """A checkpoint whose layers have 128 columns or more."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "tie_word_embeddings": False}
    wide |= {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    return tiny.save(folder / "original", family, dtype=dtype, **wide)


def compressed(folder, name, **changes):
    chosen = local.settings(source(folder, **changes), folder / "out", RoundToNearest(), level=parse_level(name))
    local.compress(chosen, TOKENS)
    return Task(chosen)


def check(folder, dtype=torch.bfloat16):
    """transformers computes, where it does not round inputs, what hasten computes with the weights that it reads."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    # Scales of inputs come from the calibration of inputs.
    missing = {name.rpartition(".")[2] for name in info.pop("missing_keys")}
    assert missing <= {"input_scale", "input_global_scale"}
    assert not any(info.values()), info
    for module in model.modules():
        module.quantization_enabled = False
    ours = Architecture(Checkpoint(folder), as_served=False)
    with torch.no_grad():
        model(TOKENS, use_cache=False)  # prepared modules are unpacked at the first use
        found = torch.nn.Module.float(model)(TOKENS, use_cache=False).logits
        hidden = ours.embed(TOKENS)
        for block in range(ours.num_blocks):
            hidden = ours.run_block(ours.load_block(block), block, hidden)
        # The weights are equal; only the order of float32 sums differs.
        torch.testing.assert_close(found, ours.head(hidden), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_loads_every_packing(tmp_path, alone, name):
    task = compressed(tmp_path, name)
    check(task.output.path)
    checkpoint = Checkpoint(task.output.path)
    for groups in task.layer_groups:
        weights = {path: read() for path, read in task.output.read_layers(groups)}
        for layer in (layer for group in groups for layer in group.layers):
            assert torch.equal(checkpoint.tensor(f"{layer.name}.weight"), weights[layer.module])
    level, rows = task.settings.level, [layer for groups in task.layer_groups for g in groups for layer in g.layers]
    bits = sum(level.stored_bits(layer.rows, layer.columns, 2) for layer in rows)
    assert sizes(checkpoint).bits_per_weight == bits / sum(layer.rows * layer.columns for layer in rows)
    assert not needs_loader(checkpoint.config["quantization_config"], checkpoint.config["dtype"])


@pytest.mark.parametrize("name", ["w8a8", "mxfp8", "nvfp4", "fp8_block"])
def test_experts_of_every_packing_are_loaded(tmp_path, loader, name):
    task = compressed(tmp_path, name, family="mixtral")
    check(task.output.path)
    config = Checkpoint(task.output.path).config
    assert needs_loader(config["quantization_config"], config["dtype"]) == (name != "fp8_block")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4a16"])
def test_the_loader_casts_weights_that_are_unpacked_in_bfloat16(tmp_path, loader, name):
    task = compressed(tmp_path, name, dtype=torch.float32)
    check(task.output.path, torch.float32)
    config = Checkpoint(task.output.path).config
    assert needs_loader(config["quantization_config"], config["dtype"])


def test_floats_integers_and_plain_layers_are_loaded_from_one_checkpoint(tmp_path, alone):
    levels = make_levels([4], [32], True, schemes=["nvfp4a16", "fp8", "w8a8", "mxfp4"])
    chosen = local.settings(source(tmp_path), tmp_path / "levels", GPTQ(), levels=levels, level=levels[-1])
    local.compress(chosen, tiny.tokens(8, 16))
    architecture = Task(chosen).architecture
    database = LevelDatabase.read(chosen.output, architecture)
    units = make_units(database, "none", keep=True)
    assert {choice.level for choice in units[0].choices} == {*database.levels, KEEP}
    assert [choice.bits for choice in units[0].choices] == sorted(choice.bits for choice in units[0].choices)
    names = [unit.name for unit in units]
    mixture = {name: [*database.levels, KEEP][place % 6] for place, name in enumerate(names)}
    output = mixed_output(architecture, database, mixture, tmp_path / "out")
    output.open({}, overwrite=False)
    write_mixed(output, database, mixture)
    described = Checkpoint(tmp_path / "out").config["quantization_config"]
    assert described["format"] == "mixed-precision"
    assert {group["format"] for group in described["config_groups"].values()} == {
        "pack-quantized",
        "nvfp4-pack-quantized",
        "float-quantized",
        "int-quantized",
        "mxfp4-pack-quantized",
    }
    check(tmp_path / "out")


def test_the_config_says_how_servers_round_inputs(tmp_path):
    task = compressed(tmp_path, "nvfp4")
    (group,) = Checkpoint(task.output.path).config["quantization_config"]["config_groups"].values()
    assert group["weights"]["scale_dtype"] == group["input_activations"]["scale_dtype"] == "torch.float8_e4m3fn"
    assert group["input_activations"]["dynamic"] == "local"
    assert group["weights"]["dynamic"] is False
