import json

import pytest
import torch

from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, MLP
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import INTEGERS, CompressedTensors
from hasten.accel.compression.levels.depth import (
    ZEROS,
    dropped_bits,
    make_depth,
    make_zeros,
    part_of,
    shorten,
    zero_weight,
)
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

FULL, SLIDING = "full_attention", "sliding_attention"


FORMAT = CompressedTensors()


def architecture(folder, family, without=(), extra=None, **changes):
    """Architecture of a tiny checkpoint. without: keys removed from its config.json; extra: entries added to it."""
    source = tiny.save(folder, family, **changes)
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without} | (extra or {})
    (source / "config.json").write_text(json.dumps(config))
    return Architecture(Checkpoint(source))


def test_types_that_transformers_derives_from_block_numbers_are_written_out(tmp_path):
    model = architecture(tmp_path, "gemma2", ["layer_types"], num_hidden_layers=4, layer_types=None)
    config = shorten(model, (1, 2))
    assert config["num_hidden_layers"] == 2
    assert config["layer_types"] == [FULL, SLIDING]


def test_a_pattern_that_no_longer_holds_is_taken_out(tmp_path):
    removed = ["layer_types", "_sliding_window_pattern"]
    extra = {"sliding_window_pattern": 3}
    model = architecture(tmp_path, "gemma3_text", removed, extra, num_hidden_layers=4, layer_types=None)
    config = shorten(model, (0, 2, 3))
    assert config["layer_types"] == [SLIDING, FULL, SLIDING]
    assert "sliding_window_pattern" not in config


def test_the_first_blocks_without_a_window_are_counted_anew(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": tiny.WINDOW, "max_window_layers": 3}
    model = architecture(tmp_path, "qwen2", ["layer_types"], num_hidden_layers=5, **window)
    config = shorten(model, (0, 2, 3))
    assert config["layer_types"] == [FULL, FULL, SLIDING]
    assert config["max_window_layers"] == 2


def test_blocks_that_are_no_mixtures_are_listed(tmp_path):
    # Every second block is a mixture: 1 and 3.
    model = architecture(tmp_path, "qwen3_moe", num_hidden_layers=5)
    config = shorten(model, (1, 2, 3))
    assert config["decoder_sparse_step"] == 1
    assert config["mlp_only_layers"] == [1]


def test_the_language_model_of_a_multimodal_gemma_is_shortened_and_no_other_part(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny.build("gemma3_text", num_hidden_layers=3, layer_types=[SLIDING, FULL, SLIDING]).config.to_dict()
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=tiny.VOCABULARY - 1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = Architecture(Checkpoint(tmp_path))
    before = json.dumps(model.checkpoint.config)
    shorter = shorten(model, (1, 2))
    assert shorter["text_config"]["num_hidden_layers"] == 2
    assert shorter["text_config"]["layer_types"] == [FULL, SLIDING]
    assert shorter["vision_config"]["num_hidden_layers"] == 1
    assert "num_hidden_layers" not in shorter
    assert json.dumps(model.checkpoint.config) == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_config_of_all_blocks_is_the_original(tmp_path, family):
    model = architecture(tmp_path, family)
    assert shorten(model, (0, 1)) == model.checkpoint.config


def test_a_block_without_both_parts_is_left_out(tmp_path):
    model = architecture(tmp_path, "llama", num_hidden_layers=4)
    depth = make_depth(model, {0: {ATTENTION, MLP}, 1: {MLP}, 3: {BLOCK, ATTENTION}, 2: ()})
    assert depth.kept == (1, 2)
    assert depth.zeros == {1: {MLP}}


def test_a_block_whose_norms_change_the_residual_stream_stays_without_its_parts(tmp_path):
    model = architecture(tmp_path, "opt", do_layer_norm_before=False)
    assert make_depth(model, {0: {ATTENTION, MLP}}).kept == (0, 1)
    assert make_depth(model, {0: {BLOCK}}).kept == (1,)


def test_a_model_without_blocks_is_refused(tmp_path):
    model = architecture(tmp_path, "llama")
    with pytest.raises(UserError, match="all 2 blocks of the model are dropped: at least one must stay"):
        make_depth(model, {0: {BLOCK}, 1: {ATTENTION, MLP}})
    for wrong in ({2: {BLOCK}}, {0: {"head"}}):
        with pytest.raises(ValueError, match="is no part of the 2 blocks"):
            make_depth(model, wrong)


@pytest.mark.parametrize("scheme", [ZEROS.scheme, Scheme(3, 32, symmetric=True), Scheme(4, 16), Scheme(8, -1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zeros_dequantize_to_exactly_zero(scheme, dtype):
    weight, loader = zero_weight(torch.zeros(24, 96, dtype=dtype), scheme), LoaderScheme(INTEGERS, scheme)
    unpacked = FORMAT.unpack(FORMAT.pack(weight, loader), loader)
    for found in (weight.dequantize(), unpacked):
        assert found.dtype == dtype
        assert torch.equal(found, torch.zeros(24, 96, dtype=dtype))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_are_sorted_into_attention_and_mlp(tmp_path, family):
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"}, {"fc1", "fc2", "w1", "w2", "w3"}
    mlp |= {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    for layer in architecture(tmp_path, family).linears(1):
        leaf = layer.name.rpartition(".")[2]
        assert leaf in (attention if part_of(layer) == ATTENTION else mlp)


def test_dropped_bits_are_codes_and_one_scale_a_row(tmp_path):
    model = architecture(tmp_path, "llama", dtype=torch.bfloat16)
    layers = [layer for layer in model.linears(0) if part_of(layer) == MLP]
    # gate and up are 128 x 64, down is 64 x 128.
    assert dropped_bits(layers, model.checkpoint) == 3 * 2 * 64 * 128 + 16 * (128 + 128 + 64)


def test_dropped_experts_have_the_grid_of_the_others(tmp_path):
    model = architecture(tmp_path, "mixtral", dtype=torch.bfloat16)
    experts = [layer for layer in model.linears(0) if layer.expert is not None]
    weights = 4 * 3 * 64 * 32
    assert dropped_bits(experts, model.checkpoint, parse_level("w3g32")) == 3 * weights + 16 * weights // 32
    assert dropped_bits(experts, model.checkpoint, None) == 16 * weights


def test_biases_are_zeros_of_their_own_dtype(tmp_path):
    model = architecture(tmp_path, "opt", dtype=torch.bfloat16)
    last = model.linears(0)[-1]
    parts = make_zeros(last, model.checkpoint).parts(model.checkpoint, FORMAT)
    assert set(parts) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert torch.equal(parts["bias"], torch.zeros(64, dtype=torch.bfloat16))
