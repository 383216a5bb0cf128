"""Shared by jobs that write checkpoints: how transformers loads them."""

from pathlib import Path

from hasten.accel.activations.hadamard import is_online
from hasten.accel.models.checkpoint import read_json
from hasten.accel.models.loading_needs import fuses_experts, initialises_layers
from hasten.accel.models.packed import needs_loader

_LOADER = "hasten.accel.models.transformers_loader"


def loader_of(folder: Path) -> str | None:
    """Module to import before transformers loads a checkpoint; None where it loads it by itself."""
    config = read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    quantization = config.get("quantization_config")
    if quantization and not quantization.get("dequantize") and (fuses_experts(config) or initialises_layers(config)):
        return _LOADER
    return _LOADER if needs_loader(quantization, dtype) else None


def print_loader(module: str | None, folder: Path) -> None:
    """Print what transformers needs to load a checkpoint, if anything. module: see loader_of."""
    if module is not None:
        print(f"transformers loads it after `import {module}`")
        if is_online(read_json(folder / "config.json").get("quantization_config")):
            print("without it, transformers does not rotate inputs of layers: it runs another model, without an error")
