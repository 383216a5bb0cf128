"""Compression of tiny random checkpoints in this process, and loading of the result by transformers."""

from pathlib import Path
from typing import Any

import torch

from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.models.skeleton import model_class, read_config
from hasten.accel.models.trial import TOKENS
from tests.compression import local

SCHEME = Scheme(4, -1, symmetric=True)


def compress(source: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Compress to symmetric 4 bits, one scale a row; facts of the layers."""
    return local.compress(local.settings(source, output, RoundToNearest(), scheme=SCHEME, **changes), TOKENS)


def load(folder: Path) -> Any:
    """The model that transformers loads; it must find all tensors, and no others."""
    kind = model_class(read_config(folder), folder)
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        model.eval()(input_ids=TOKENS, use_cache=False)  # some weights are unpacked at the first use
    return model
