"""Checkpoints that other programs quantized, as sources: our tensors are those that the programs dequantize."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.mxfp4_blocks import dequantize
from hasten.accel.models.sources import without_quantization
from tests.models import foreign, tiny

NAME = "model.layers.1.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
EXPERTS = "model.layers.0.mlp.experts"

# One preset for each format, strategy and kind of scale.
PRESETS = {
    "W4A16_ASYM": {"group_size": 32},
    "W8A8": {},
    "FP8": {},
    "FP8_DYNAMIC": {},
    "FP8_BLOCK": {"block_structure": [32, 48]},
    "NVFP4": {},
    "MXFP4A16": {},
    "MXFP6A16": {},
    "MXFP8": {},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_format_of_compressed_tensors_is_read_as_the_library_decompresses_it(preset, tmp_path):
    expected = foreign.save_compressed(tmp_path / "model", preset, **PRESETS[preset])
    checkpoint = Checkpoint(tmp_path / "model")
    assert checkpoint.names == sorted(expected)
    assert checkpoint.is_compressed
    assert str(checkpoint.quantization(NAME).num_bits) in checkpoint.quantized_by.title
    assert checkpoint.quantization("model.layers.0.self_attn.o_proj.weight") is None
    for name, weight in expected.items():
        assert checkpoint.shape(name) == tuple(weight.shape)
        assert checkpoint.dtype(name) == weight.dtype
        assert torch.equal(checkpoint.tensor(name), weight)
        checkpoint.check(name)
    assert torch.equal(checkpoint.rows(NAME, torch.tensor([5, 0, 5])), expected[NAME][[5, 0, 5]])
    stored = load_file(tmp_path / "model/model.safetensors")
    parts = [tensor for name, tensor in stored.items() if name.startswith(f"{MODULE}.weight")]
    assert checkpoint.stored_bytes(NAME) == sum(part.nbytes for part in parts if part.dtype != torch.int64)


def test_columns_in_activation_order_take_the_scales_of_their_groups(packed_with_zeros, tmp_path):
    """Permuting the columns of a weight and the group index permutes those of the dequantized weight."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    copy = Path(shutil.copytree(packed_with_zeros, tmp_path / "copy"))
    expected = Checkpoint(copy).tensor(NAME)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors = load_file(copy / "model.safetensors")
    codes = unpack_from_int32(tensors[f"{MODULE}.weight_packed"], 4, torch.Size(expected.shape))
    tensors[f"{MODULE}.weight_packed"] = pack_to_int32(codes[:, order].contiguous(), 4)
    tensors[f"{MODULE}.weight_g_idx"] = (order // 32).int()
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (copy / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(copy)
    assert checkpoint.names == Checkpoint(packed_with_zeros).names
    assert torch.equal(checkpoint.tensor(NAME), expected[:, order])


def test_fp8_blocks_are_multiplied_with_their_scales(tmp_path):
    """Shapes that blocks do not divide; beside them transformers' own function where they do."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    plain = foreign.save_fp8(tmp_path / "model", block=(32, 48))
    checkpoint = Checkpoint(tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    assert checkpoint.names == sorted(plain)
    assert checkpoint.dtype(NAME) == torch.bfloat16
    scales = stored[f"{NAME}_scale_inv"]
    by_hand = stored[NAME].float() * scales.repeat_interleave(32, 0)[:128].repeat_interleave(48, 1)[:, :64]
    assert torch.equal(checkpoint.tensor(NAME), by_hand.bfloat16())
    assert (checkpoint.tensor(NAME).float() - plain[NAME].float()).abs().max() < 0.07 * plain[NAME].float().abs().max()
    assert torch.equal(checkpoint.rows(NAME, torch.tensor([33, 2])), by_hand.bfloat16()[[33, 2]])
    assert checkpoint.quantization(NAME).block_structure == [32, 48]
    foreign.save_fp8(tmp_path / "even", block=(32, 32))
    even = load_file(tmp_path / "even/model.safetensors")
    theirs = Fp8Dequantize(None)._dequantize_one(even[NAME], even[f"{NAME}_scale_inv"], torch.bfloat16)
    assert torch.equal(Checkpoint(tmp_path / "even").tensor(NAME), theirs)


@pytest.mark.parametrize("scale", ["scalar", "ue8m0", "bytes", "weight_scale", "other blocks"])
def test_other_scales_of_fp8_are_read(scale, tmp_path):
    foreign.save_fp8(tmp_path / "model", block=(32, 32))
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    given = tensors.pop(f"{NAME}_scale_inv")
    codes = tensors[NAME].float()
    exponent = given.log2().round()
    grid = 2**exponent
    changed = {
        "scalar": {f"{NAME}_scale_inv": given.max()},
        "ue8m0": {f"{NAME}_scale_inv": grid.to(torch.float8_e8m0fnu)},
        "bytes": {f"{NAME}_scale_inv": (exponent + 127).to(torch.uint8)},
        "weight_scale": {f"{MODULE}.weight_scale": given, f"{MODULE}.input_scale": torch.ones(())},
        "other blocks": {f"{NAME}_scale_inv": given.repeat_interleave(2, 1)},
    }[scale]
    save_file(tensors | changed, file)
    spread = given if scale in ("weight_scale", "other blocks") else grid
    expected = codes * (given.max() if scale == "scalar" else spread.repeat_interleave(32, 0).repeat_interleave(32, 1))
    assert torch.equal(Checkpoint(tmp_path / "model").tensor(NAME), expected.bfloat16())


def test_fused_experts_in_fp8_appear_one_by_one(tmp_path):
    model = tiny.save(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    file = model / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "experts" not in name}
    fused = {"gate_up_proj": (4, 64, 64), "down_proj": (4, 64, 32)}
    generator = torch.Generator().manual_seed(0)
    for leaf, shape in fused.items():
        name = f"model.layers.1.mlp.experts.{leaf}"
        tensors[name] = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(4, shape[1] // 16, shape[2] // 16, generator=generator)
    save_file(tensors, file)
    foreign.announce(model, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    checkpoint = Checkpoint(model)
    name = "model.layers.1.mlp.experts"
    whole = tensors[f"{name}.gate_up_proj"].float()
    whole *= tensors[f"{name}.gate_up_proj_scale_inv"].repeat_interleave(16, 1).repeat_interleave(16, 2)
    expected = whole.to(checkpoint.dtype(f"{name}.3.up_proj.weight"))
    assert torch.equal(checkpoint.tensor(f"{name}.3.gate_proj.weight"), expected[3, :32])
    assert torch.equal(checkpoint.tensor(f"{name}.3.up_proj.weight"), expected[3, 32:])


def test_mxfp4_experts_are_the_parameters_that_transformers_dequantizes(tmp_path):
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    stored = foreign.save_mxfp4(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    place = checkpoint.quantized_by.tensors(checkpoint._stored)[0][f"{EXPERTS}.gate_up_proj"]
    blocks, scales = (stored[f"{EXPERTS}.gate_up_proj_{part}"] for part in ("blocks", "scales"))
    theirs = _convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert place.shape == tuple(theirs.shape) == (2, 64, 128)
    assert torch.equal(place.read(), theirs)
    # gpt-oss interleaves the outputs of gate and up projection.
    up = place.columns(1, 1, 128, 2)
    assert up.shape == (64, 64)
    assert torch.equal(up.read(), theirs[1, :, 1::2].T)
    assert torch.equal(up.read_rows([(3, 2), (0, 1)]), theirs[1, :, 1::2].T[[3, 4, 0]])
    assert up.nbytes == 64 * (32 + 2)
    assert not [name for name in checkpoint.names if name.endswith(("_blocks", "_scales"))]


def test_the_codes_of_mxfp4_are_the_values_of_the_standard():
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes[0::2] | codes[1::2] << 4).repeat(2)[None]
    weight = dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert weight[0, :16].tolist() == [2 * value for value in (*positive, *(-value for value in positive))]


def test_columns_of_a_plain_stack_are_rows(tmp_path):
    model = tiny.save(tmp_path / "model", "llama")
    stack = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    save_file(load_file(model / "model.safetensors") | {"stack": stack}, model / "model.safetensors")
    columns = Checkpoint(model)._stored["stack"].columns(1, 1, 8, 2)
    assert columns.shape == (4, 3)
    assert columns.nbytes == 4 * 3 * 4
    assert torch.equal(columns.read(), stack[1, :, 1::2].T)
    assert torch.equal(columns.read_rows([(2, 2)]), stack[1, :, 1::2].T[2:])


def _read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.shape(NAME)
    checkpoint.check(NAME)


def _broken(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a layer; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for leaf, tensor in changes.items():
        tensors.pop(f"{MODULE}.{leaf}", None)
        if tensor is not None:
            tensors[f"{MODULE}.{leaf}"] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("NVFP4", {"weight_scale": None}, [f"{MODULE}.weight_scale", "missing"]),
        ("NVFP4", {"weight_global_scale": None}, [f"{MODULE}.weight_global_scale", "missing"]),
        ("NVFP4", {"weight_scale": torch.ones(128, 3)}, [f"{MODULE}.weight_scale", "[128, 3]", "[128, 4]"]),
        ("W8A8", {"weight_scale": None}, [f"{MODULE}.weight_scale", "missing"]),
        ("W8A8", {"weight_scale": torch.full((128, 1), torch.nan)}, [f"{MODULE}.weight_scale", "NaN"]),
        ("fp8", {"weight_scale_inv": None}, [f"{MODULE}.weight_scale_inv", "missing", "8-bit floats"]),
        ("fp8", {"weight_scale_inv": torch.ones(3, 5)}, [f"{MODULE}.weight_scale_inv", "[3, 5]", "[128, 64]"]),
        ("fp8", {"weight_scale_inv": torch.full((4, 2), torch.inf)}, [f"{MODULE}.weight_scale_inv", "infinite"]),
        ("fp8", {"weight": torch.full((128, 64), torch.nan).to(torch.float8_e4m3fn)}, [NAME, "NaN"]),
    ],
)
def test_damaged_and_missing_scales_are_named(kind, changes, words, tmp_path, sources):
    folder = Path(shutil.copytree(sources(kind), tmp_path / "copy"))
    _broken(folder, **changes)
    with pytest.raises(UserError) as caught:
        _read(folder)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_eight_bit_floats_without_a_quantization_config_are_refused(tmp_path, sources):
    folder = Path(shutil.copytree(sources("fp8"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(without_quantization(config)))
    with pytest.raises(UserError, match=r"up_proj|down_proj|q_proj|k_proj|v_proj|o_proj|gate_proj") as caught:
        Checkpoint(folder)
    assert "quantization_config" in str(caught.value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Function of a kind that returns a checkpoint, made at the first call."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            if kind == "fp8":
                foreign.save_fp8(made[kind], block=(32, 32))
            else:
                foreign.save_compressed(made[kind], kind)
        return made[kind]

    return make
