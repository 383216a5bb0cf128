"""Shared by jobs that write checkpoints: how transformers loads them."""

from pathlib import Path

from hasten.accel.models.checkpoint import read_json
from hasten.accel.models.packed import needs_loader

_LOADER = "hasten.accel.models.transformers_loader"


def loader_of(folder: Path) -> str | None:
    """Module to import before transformers loads a checkpoint; None where it loads it by itself."""
    config = read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return _LOADER if needs_loader(config.get("quantization_config"), dtype) else None


def print_loader(module: str | None) -> None:
    """Print what transformers needs, if anything."""
    if module is not None:
        print(f"transformers loads it after `import {module}`")
