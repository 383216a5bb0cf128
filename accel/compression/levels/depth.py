"""Dropped blocks, attention and MLP parts, in the form in which plain transformers loads what is left.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress), drops blocks and their two parts; He et al. 2024,
arXiv:2406.15786, attention layers. Both evaluate such models; neither says how they are stored.

A dropped block is left out: later blocks move up, and the config gets shorter. transformers knows no block without
attention or MLP, so the layers of a dropped part stay, as zeros in the cheapest form there is: what a part adds to the
residual stream is then exactly zero, behind Gemma's second norms, too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, MLP
from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint

# How the layers of a dropped part are stored.
ZEROS = Scheme(2, -1, symmetric=True)

# Layers whose output is that of their part.
_LAST = ("o_proj", "out_proj", "down_proj", "fc2")
# Entries of a config that have one value for every block.
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Entries from which transformers would make layer_types.
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")


@dataclass(frozen=True)
class Depth:
    """What is left of a model's blocks. kept: numbers of those that stay. zeros: parts that are zeros in those."""

    kept: tuple[int, ...]
    zeros: Mapping[int, frozenset[str]]

    def is_zero(self, block: int, layer: Layer) -> bool:
        """Whether a layer lies in a dropped part of a block that stays."""
        return part_of(layer) in self.zeros.get(block, ())


def make_depth(architecture: Architecture, dropped: Mapping[int, Collection[str]]) -> Depth:
    """Depth without the dropped kinds, by block; UserError where no block would stay.

    A block without both parts is left out, but for OPT-350m's, which norms the sum behind each of them.
    """
    for block, kinds in dropped.items():
        if not 0 <= block < architecture.num_blocks or not set(kinds) <= {ATTENTION, MLP, BLOCK}:
            raise ValueError(f"{sorted(kinds)} of block {block} is no part of the {architecture.num_blocks} blocks")
    norms_sums = not getattr(architecture.config, "do_layer_norm_before", True)
    kept: list[int] = []
    zeros: dict[int, frozenset[str]] = {}
    for block in range(architecture.num_blocks):
        kinds = frozenset(dropped.get(block, ()))
        if BLOCK in kinds or (kinds == {ATTENTION, MLP} and not norms_sums):
            continue
        kept.append(block)
        if kinds:
            zeros[block] = kinds
    if not kept:
        raise UserError(f"all {architecture.num_blocks} blocks of the model are dropped: at least one must stay")
    return Depth(tuple(kept), zeros)


def part_of(layer: Layer) -> str:
    """Kind of the part of its block that a layer lies in, `attention` or `mlp`."""
    return ATTENTION if layer.module.startswith("self_attn.") else MLP


def is_last(layer: Layer) -> bool:
    """Whether a layer's output is that of its part, or of an expert."""
    return layer.module.endswith(_LAST)


@dataclass(frozen=True)
class Zeros:
    """What stands for a layer of a dropped part. scheme: the grid of its codes, None for a plain tensor.

    itemsize: bytes of one of the layer's weights in the checkpoint, and of a scale.
    """

    layer: Layer
    scheme: Scheme | None
    itemsize: int

    @property
    def stored_bits(self) -> int:
        """Exact size: codes and scales, or plain zeros."""
        if self.scheme is None:
            return self.layer.rows * self.layer.columns * 8 * self.itemsize
        return self.scheme.stored_bits(self.layer.rows, self.layer.columns, self.itemsize)

    def parts(self, checkpoint: Checkpoint, pack: Callable[[QuantizedWeight], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors to store, by what follows the layer's name: of the weight, and of the bias where there is one."""
        dtype = checkpoint.dtype(f"{self.layer.name}.weight")
        if self.scheme is None:
            parts = {"weight": torch.zeros(self.layer.rows, self.layer.columns, dtype=dtype)}
        else:
            parts = pack(zero_weight(self.layer.rows, self.layer.columns, self.scheme, dtype))
        bias = f"{self.layer.name}.bias"
        if bias in checkpoint:
            parts["bias"] = torch.zeros(checkpoint.shape(bias), dtype=checkpoint.dtype(bias))
        return parts


def make_zeros(layer: Layer, checkpoint: Checkpoint, experts: Scheme | None = ZEROS) -> Zeros:
    """Zeros in the cheapest form, and of an expert on the grid of the others (None: plain): transformers reads one."""
    itemsize = checkpoint.dtype(f"{layer.name}.weight").itemsize
    return Zeros(layer, ZEROS if layer.expert is None else experts, itemsize)


def dropped_bits(layers: Iterable[Layer], checkpoint: Checkpoint, experts: Scheme | None = ZEROS) -> int:
    """Exact size of what stands for these layers when their part is dropped; a dropped block takes nothing.

    layers: those of the part that a database has. experts: as in make_zeros.
    """
    return sum(make_zeros(layer, checkpoint, experts).stored_bits for layer in layers)


def zero_weight(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """A weight (R, C) that dequantizes to exactly zero, with scales of that dtype."""
    groups = columns // scheme.columns(columns)
    middle = 2 ** (scheme.bits - 1)
    return QuantizedWeight(
        codes=torch.full((rows, columns), middle, dtype=torch.uint8),
        scale=torch.ones(rows, groups, dtype=dtype),
        zero_point=torch.full((rows, groups), middle, dtype=torch.uint8),
        scheme=scheme,
    )


def shorten(architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """Content of config.json for a checkpoint with these of the model's blocks.

    What transformers derives from a block's number is written out, because numbers change.
    """
    config = dict(architecture.checkpoint.config)
    if len(kept) == architecture.num_blocks:
        return config
    nested = isinstance(config.get("text_config"), dict)
    text = dict(config["text_config"]) if nested else config
    text["num_hidden_layers"] = len(kept)
    for name in _LISTS:
        values = getattr(architecture.config, name, None)
        if values is not None:
            text[name] = [values[block] for block in kept]
    if "layer_types" in text:
        for name in _PATTERNS:
            text.pop(name, None)
    if isinstance(text.get("max_window_layers"), int):
        # Qwen's first blocks that see everything.
        text["max_window_layers"] = sum(block < text["max_window_layers"] for block in kept)
    if hasattr(architecture.config, "decoder_sparse_step"):
        # Mixtures are every so many blocks, or all but the listed ones: only a list can name any of them.
        text["decoder_sparse_step"] = 1
        text["mlp_only_layers"] = [place for place, block in enumerate(kept) if not _is_mixture(architecture, block)]
    return config | {"text_config": text} if nested else text


def _is_mixture(architecture: Architecture, block: int) -> bool:
    return any(layer.expert is not None for layer in architecture.linears(block))
