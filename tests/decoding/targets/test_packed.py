"""The fast path of compressed checkpoints: packed weights give the products of the dequantized model."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.targets.matmul import QuantizedWeight
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.models.packed import CompressedWeight
from hasten.kernels.packed_gemm import reference
from hasten.kernels.packed_weight import pack_codes

PROMPT = [504, 388, 22, 771, 906, 11, 3, 95]
LAYERS = r"model\.layers\..*_proj"
# A grid by a regular expression of module names: bits, columns of a group (None for whole rows), whether symmetric.
W4 = {LAYERS: (4, 64, False)}
TIED = {**W4, r"model\.embed_tokens": (8, 64, True)}
MIXED = {r".*[qv]_proj": (4, 64, False), r".*k_proj": (8, None, True), r".*(gate|up|o)_proj": (3, 128, True)}


def compress(source, folder, grids):
    """Write a checkpoint whose layers are rounded to the grid of the first expression that matches."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, targets = {}, {grid: [] for grid in grids.values()}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        grid = next((grid for pattern, grid in grids.items() if re.fullmatch(pattern, module)), None)
        if grid is None:
            tensors[name] = weight
            continue
        bits, group, symmetric = grid
        targets[grid].append(module)
        columns = weight.float().unflatten(1, (-1, group or weight.shape[1]))
        middle = 2 ** (bits - 1)
        low, high = columns.amin(-1).clamp(max=0), columns.amax(-1).clamp(min=0)
        scale = torch.maximum(high, -low) / (middle - 1) if symmetric else (high - low) / (2**bits - 1)
        scale = scale.bfloat16().float()
        zero_point = torch.full_like(scale, middle) if symmetric else (-low / scale).round()
        codes = (columns / scale[..., None] + zero_point[..., None]).round().clamp(0, 2**bits - 1).flatten(1)
        tensors[f"{module}.weight_packed"] = pack_codes(codes.to(torch.uint8), bits)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            packed = pack_codes(zero_point.T.to(torch.uint8), bits).T
            tensors[f"{module}.weight_zero_point"] = packed.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group else "channel",
                "group_size": group,
            },
        }
        for number, ((bits, group, symmetric), names) in enumerate(targets.items())
        if names
    }
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def dequantize(compressed, folder):
    """Write the float32 checkpoint of the same weights."""
    checkpoint = Checkpoint(compressed)
    tensors = {
        name: reference.dequantize(checkpoint.packed(name)) if checkpoint.is_packed(name) else checkpoint.tensor(name)
        for name in checkpoint.names
    }
    shutil.copytree(compressed, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(
        {name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def w4(tmp_path_factory):
    """A folder of the embedded target in 4 bits."""
    return compress(resolve("embedded:target"), tmp_path_factory.mktemp("packed") / "w4", W4)


def products(target):
    for layer in target._decoder.layers:
        yield from (layer.qkv, layer.out, layer.mlp._gate_up, layer.mlp._down)


def greedy(target, count):
    target.reserve(1, len(PROMPT) + count + 1)
    target.prefill(0, PROMPT)
    tokens = [11]
    for _ in range(count):
        logits = target.forward([0], [tokens[-1:]], [[ROOT]]).logits[0, 0]
        target.commit(0, [0])
        tokens.append(int(logits.argmax()))
    return tokens, logits


def test_tokens_are_those_of_the_dequantized_model(w4, tmp_path):
    target, dense = load_target(w4, torch.float32), load_target(dequantize(w4, tmp_path / "dense"), torch.float32)
    assert isinstance(target, FastTarget)
    tokens, logits = greedy(target, 40)
    expected_tokens, expected = greedy(dense, 40)
    assert tokens == expected_tokens
    # Sums in another order.
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_no_layer_is_dequantized_while_loading_or_decoding(w4, monkeypatch):
    monkeypatch.setattr(CompressedWeight, "read", None)
    target = load_target(w4, torch.float32)
    greedy(target, 2)
    weights = list(products(target))
    assert all(isinstance(weight, QuantizedWeight) for weight in weights)
    checkpoint = Checkpoint(w4)
    stored = sum(checkpoint.stored_bytes(name) for name in checkpoint.names if checkpoint.is_packed(name))
    scales = stored // 17  # the test's scales are float32 in the file
    assert (
        sum(weight.weight.nbytes for weight in weights) <= stored < sum(w.weight.nbytes for w in weights) + 2 * scales
    )


def test_a_token_alone_has_the_logits_of_a_node_to_the_bit(w4):
    target = load_target(w4, torch.float32)
    rows = torch.randn(9, 256, generator=torch.Generator().manual_seed(0))
    for weight in products(target):
        if weight.weight.shape[1] == 256:
            assert torch.equal(weight(rows)[4:5], weight(rows[4:5]))


@pytest.mark.parametrize("grids", [TIED, MIXED], ids=["packed embedding", "grids that cannot be joined"])
def test_layers_of_all_grids_are_multiplied_packed(grids, tmp_path):
    folder = compress(resolve("embedded:target"), tmp_path / "packed", grids)
    target, dense = (
        load_target(folder, torch.float32),
        load_target(dequantize(folder, tmp_path / "dense"), torch.float32),
    )
    (_, logits), (_, expected) = greedy(target, 3), greedy(dense, 3)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(target.embedding().float(), dense.embedding().float())
    if grids is TIED:
        assert isinstance(target._decoder.head, QuantizedWeight)  # the embedding's own tensors


def test_six_bits_are_read_as_eight(tmp_path):
    folder = compress(resolve("embedded:target"), tmp_path / "w6", {LAYERS: (6, 64, False)})
    checkpoint, name = Checkpoint(folder), "model.layers.1.mlp.down_proj.weight"
    weight = checkpoint.packed(name)
    assert weight.bits == 8
    torch.testing.assert_close(reference.dequantize(weight), checkpoint.tensor(name))


def test_quantized_activations_are_left_to_transformers(w4, tmp_path):
    folder = shutil.copytree(w4, tmp_path / "w4a8")
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its weights are quantized, and not only packed integers"):
        load_target(folder, torch.float32, path="fast")
