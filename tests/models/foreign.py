"""Quantized checkpoints as other programs write them, with the weights that those programs dequantize."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import tiny

FP8_MAX = 448.0


def save_compressed(path: Path, preset: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Tensor]:
    """A tiny Llama that compressed-tensors compressed and transformers saved; its weights after decompression, by name.

    preset: name of a scheme of compressed-tensors. changes: of its weights.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = tiny.build("llama").to(dtype)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme = scheme.model_copy(update={"weights": scheme.weights.model_copy(update=changes)})
    ignore = ["lm_head", "model.layers.0.self_attn.o_proj"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore))
    for module in model.modules():
        if isinstance(module, nn.Linear) and getattr(module, "quantization_scheme", None) is not None:
            _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    compressor.decompress_model(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(("weight", "bias"))}


def _calibrate(module: nn.Linear) -> None:
    """Scales of a layer's weight from its values; those of its inputs stay what they are."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = module.quantization_scheme.weights
    weight, global_scale = module.weight.data, getattr(module, "weight_global_scale", None)
    if global_scale is not None:
        global_scale.data.copy_(generate_gparam(weight.min(), weight.max()))
    if args.strategy == "block":
        height, width = args.block_structure
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
        tiles = padded.unflatten(0, (-1, height)).unflatten(-1, (-1, width))
        module.weight_scale.data.copy_(tiles.abs().amax((1, 3)) / FP8_MAX)
        return
    if args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "tensor":
        low, high = weight.min(), weight.max()
    else:
        groups = weight.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point.reshape(module.weight_zero_point.shape))


def save_fp8(path: Path, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A tiny Llama whose linear layers are 8-bit floats in blocks, as DeepSeek-V3 is stored; the original's weights."""
    tiny.save(path, "llama", dtype=dtype)
    original = load_file(path / "model.safetensors")
    tensors = {}
    for name, tensor in original.items():
        if tensor.ndim != 2 or "proj" not in name:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        padded = nn.functional.pad(tensor.float(), (0, -columns % block[1], 0, -rows % block[0]))
        tiles = padded.unflatten(0, (-1, block[0])).unflatten(-1, (-1, block[1]))
        scale = tiles.abs().amax((1, 3)) / FP8_MAX
        codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    announce(path, {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"})
    return original


def save_mxfp4(path: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss of two experts in MXFP4; its stored tensors."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    announce(path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return tensors


def announce(path: Path, section: dict[str, Any]) -> None:
    """Write a quantization_config into a checkpoint's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
