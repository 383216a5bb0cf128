"""The checkpoint with fewer KV heads: one that transformers and servers load as they load the original."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accel.activations.hooks import attention_path
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.kv_heads.folding import KVHeads, folded
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_HEADS = "num_key_value_heads"


class KVHeadsFolder(OutputFolder):
    """Output folder of a checkpoint with fewer KV heads; UserError where the model cannot have them."""

    def __init__(self, path: Path, architecture: Architecture, method: KVHeads) -> None:
        super().__init__(path, architecture, [[] for _ in range(architecture.num_blocks)], CompressedTensors())
        self.heads = check(architecture, method)

    def write_folded(self, block: int, statistics: Mapping[str, Tensor]) -> None:
        """Write a block. statistics: see KVHeads.solve."""
        architecture = self._architecture
        parameters = architecture.block_parameters(block)
        attention = attention_path(architecture.load_block(block))
        layers: dict[str, dict[str, Tensor]] = {}
        for part in ("weight", "bias"):
            names = {key: f"{attention}.{name}.{part}" for key, name in _PROJECTIONS.items()}
            # The bias of the output's projection stays as it is.
            own = {
                key: parameters[name]
                for key, name in names.items()
                if name in parameters and not (part == "bias" and key == "o")
            }
            read = {key: architecture.checkpoint.tensor(name) for key, name in own.items()}
            for key, tensor in folded(read, statistics).items():
                layers.setdefault(own[key].removesuffix(f".{part}"), {})[part] = tensor
        output = parameters.get(f"{attention}.{_PROJECTIONS['o']}.bias")
        if output is not None:
            layers[output.removesuffix(".bias")]["bias"] = architecture.checkpoint.tensor(output)
        self.write_block(block, layers, [])

    def _config(self) -> dict[str, Any]:
        return super()._config() | {_HEADS: self.heads}


def check(architecture: Architecture, method: KVHeads) -> int:
    """Number of KV heads that are left; UserError where a model's heads cannot be joined."""
    checkpoint, model = architecture.checkpoint, architecture.front
    name = type(model).__name__
    if checkpoint.is_compressed:
        raise UserError(f"{checkpoint.path} is quantized: give the original, whose projections can change")
    heads = getattr(architecture.config, _HEADS, None)
    if heads is None or "text_config" in checkpoint.config:
        raise UserError(f"{name} has no {_HEADS} at the top of its config: it cannot say that it has fewer")
    if heads % method.group:
        raise UserError(f"group={method.group} does not divide the {heads} KV heads of {name}")
    block = architecture.load_block(0)
    attention = block.get_submodule(attention_path(block) or "")
    projections = [getattr(attention, part, None) for part in _PROJECTIONS.values()]
    normed = any(hasattr(attention, part) for part in ("q_norm", "k_norm"))
    if normed or not all(isinstance(layer, torch.nn.Linear) for layer in projections):
        raise UserError(f"{name} has other parts between its projections and its heads: they cannot be joined")
    _check_rotation(model, heads, getattr(attention, "head_dim", 0), name)
    return int(heads) // method.group


def _check_rotation(model: Any, heads: int, size: int, name: str) -> None:
    """UserError where the rotary embedding does not turn number i of a head together with number i + D / 2."""
    rotate = rotary_of(model)
    keys = torch.randn(1, 4, size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(4)[None] + 5
    halves = keys.chunk(2, -1)
    turned = rotate(0, torch.cat([-halves[1], halves[0]], -1), positions, False).chunk(2, -1)
    plain = rotate(0, keys, positions, False)
    if not torch.allclose(plain, torch.cat([turned[1], -turned[0]], -1), atol=1e-4):
        raise UserError(
            f"the rotary embedding of {name} turns other pairs than halves of a head: they cannot be joined"
        )
