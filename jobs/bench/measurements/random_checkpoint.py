"""A checkpoint of random weights, written block by block, so that it takes the memory of one block."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

# Standard deviation of transformers' initialization.
_DEVIATION = 0.02


def write_random_checkpoint(folder: Path, config: PretrainedConfig, seed: int = 0) -> int:
    """Number of parameters of the checkpoint written to folder: bf16, a shard per block, no tokenizer.

    config: of a model of transformers, which is changed to bf16. Vectors are ones, all other weights normal with
    deviation 0.02.
    """
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, str] = {}
    parts = [list(names) for _, names in groupby(shapes, key=_part)]
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(dict(_tensors(names, shapes, generator)), folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(names, file)
    parameters = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.save_pretrained(folder)
    return parameters


def _part(name: str) -> str:
    """Shard of a tensor: its block, or the part before or after the blocks."""
    words = name.split(".")
    return ".".join(words[:3]) if "layers" in words else words[0]


def _tensors(
    names: list[str], shapes: dict[str, torch.Size], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        if len(shapes[name]) == 1:
            yield name, torch.ones(shapes[name], dtype=torch.bfloat16)
        else:
            drawn = torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16)
            yield name, drawn.mul_(_DEVIATION)
