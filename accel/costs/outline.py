"""A checkpoint without weights: transformers derives the names and shapes of its tensors from config.json."""

from collections.abc import Mapping
from pathlib import Path

import torch

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, read_json
from hasten.accel.models.shards import Stored
from hasten.accel.models.skeleton import build_model, read_config
from hasten.accel.models.tensor_names import saved_name


class Outline(Checkpoint):
    """Names, shapes and dtypes of a checkpoint as transformers would save it; its tensors cannot be read.

    Of tied tensors only the first is listed. UserError where transformers refuses the config.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self._headers, self._blocks, self.quantized_by = [], {}, None
        if self.config.get("quantization_config") or self.config.get("compression_config"):
            raise UserError(f"model={path} is compressed and has no safetensors: give its original's config.json")
        model = build_model(read_config(path), torch.float32, path)
        dtype, saved = _dtype(self.config), saved_name(model)
        self._stored = {
            saved(name): Stored(path / "model.safetensors", dtype, tuple(tensor.shape), 0)
            for name, tensor in model.named_parameters()
        }
        self._places = self._entries()


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder; an Outline where the folder has no weights."""
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return Outline(path)
    return Checkpoint(path)


def _dtype(config: Mapping[str, object]) -> torch.dtype:
    """The dtype that the config names, float32 where it names none."""
    given = config.get("text_config")
    text = given if isinstance(given, dict) else {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
