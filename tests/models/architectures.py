"""Tiny random checkpoints of any model type, saved by transformers, and their compression in this process."""

from pathlib import Path
from typing import Any

import torch

from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.reduced import reduced_config
from hasten.accel.models.skeleton import model_class
from tests.compression import local

TOKENS = torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def build(model_type: str, **changes: Any) -> Any:
    """A random float32 model of a type; equal configs give equal weights."""
    config = reduced_config(model_type, **changes)
    torch.manual_seed(0)
    model = model_class(config, Path(model_type))._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are initialised as constants, and with a deviation of 0.02 blocks have hardly any effect.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


def logits(model: Any) -> torch.Tensor:
    """Logits of TOKENS."""
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)  # some weights are unpacked at the first use
        result: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return result


def run(architecture: Architecture) -> torch.Tensor:
    """Logits of TOKENS, block by block."""
    hidden = architecture.embed(TOKENS)
    for index in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(index), index, hidden)
    return architecture.head(hidden)


def compress(source: Path, output: Path, ignore: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Compress to symmetric 4 bits, one scale a row; facts of the layers."""
    chosen = local.settings(source, output, RoundToNearest(), scheme=Scheme(4, -1, symmetric=True), ignore=ignore)
    return local.compress(chosen, TOKENS)


def load(folder: Path) -> Any:
    """The model that transformers loads; it must find all tensors, and no others."""
    from hasten.accel.models.skeleton import read_config

    kind = model_class(read_config(folder), folder)
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def unpacked(folder: Path) -> Architecture:
    """Our own architecture of a compressed checkpoint."""
    return Architecture(Checkpoint(folder))
