"""Depth pruning: dropped blocks, attention and MLP parts, stored so that plain transformers loads the rest.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress), drops blocks and their two parts; He et al. 2024,
arXiv:2406.15786, attention layers. Both evaluate such models; neither says how to store them.

A dropped block is not written: later blocks move up, and the config becomes shorter. transformers has no blocks
without attention or MLP, so the layers of a dropped part are stored as zeros in the cheapest form. Such a part adds
exactly zero to the residual stream, also behind Gemma's second norms.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, MLP
from hasten.accel.compression.formats.base import Format, LoaderScheme
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme, WeightScheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint

# How the layers of a dropped part are stored.
ZEROS = GridLevel(Scheme(2, -1, symmetric=True))

# Layers whose output is that of their part.
_LAST = ("o_proj", "out_proj", "down_proj", "fc2")
# Config entries with one value for every block.
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Config entries from which transformers would derive layer_types.
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")


@dataclass(frozen=True)
class Depth:
    """The blocks of a depth-pruned model. kept: numbers of the blocks that stay. zeros: their dropped parts."""

    kept: tuple[int, ...]
    zeros: Mapping[int, frozenset[str]]

    def is_zero(self, block: int, layer: Layer) -> bool:
        """Whether a layer lies in a dropped part of a block that stays."""
        return part_of(layer) in self.zeros.get(block, ())


def make_depth(architecture: Architecture, dropped: Mapping[int, Collection[str]]) -> Depth:
    """Depth from the dropped kinds of parts, by block; UserError where no block would stay.

    A block without both parts is dropped, unless it norms the residual stream behind each part, as OPT-350m's do.
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
    """Kind of the part that contains a layer, `attention` or `mlp`."""
    return ATTENTION if layer.module.startswith("self_attn.") else MLP


def is_last(layer: Layer) -> bool:
    """Whether a layer is the last one of its part, or of an expert."""
    return layer.module.endswith(_LAST)


@dataclass(frozen=True)
class Zeros:
    """The stored zeros of a layer in a dropped part. level: of their codes, None for a dense tensor.

    itemsize: bytes of a weight of the layer in the checkpoint, and of a scale.
    """

    layer: Layer
    level: Level | None
    itemsize: int

    @property
    def scheme(self) -> LoaderScheme | None:
        """How loaders read the codes; None for a dense tensor."""
        return None if self.level is None else self.level.loader_scheme

    @property
    def stored_bits(self) -> int:
        """Exact size: codes and scales, or dense zeros."""
        if self.scheme is None:
            return self.layer.rows * self.layer.columns * 8 * self.itemsize
        return self.scheme.weights.stored_bits(self.layer.rows, self.layer.columns, self.itemsize)

    def parts(self, checkpoint: Checkpoint, form: Format) -> dict[str, Tensor]:
        """Tensors to store, by what follows the layer's name: the weight's, and the bias where the layer has one."""
        zeros = torch.zeros(self.layer.rows, self.layer.columns, dtype=checkpoint.dtype(f"{self.layer.name}.weight"))
        if self.scheme is None:
            parts = {"weight": zeros}
        else:
            parts = form.pack(zero_weight(zeros, self.scheme.weights), self.scheme)
        bias = f"{self.layer.name}.bias"
        if bias in checkpoint:
            parts["bias"] = torch.zeros(checkpoint.shape(bias), dtype=checkpoint.dtype(bias))
        return parts


def make_zeros(layer: Layer, checkpoint: Checkpoint, experts: Level | None = ZEROS) -> Zeros:
    """Zeros of a layer in the cheapest form; an expert's have the form of the others, at a level (None: dense)."""
    itemsize = checkpoint.dtype(f"{layer.name}.weight").itemsize
    return Zeros(layer, ZEROS if layer.expert is None else experts, itemsize)


def dropped_bits(layers: Iterable[Layer], checkpoint: Checkpoint, experts: Level | None = ZEROS) -> int:
    """Exact size of the stored zeros of these layers; for a dropped part, not for a dropped block, which takes nothing.

    layers: the part's layers in a database. experts: as in make_zeros.
    """
    return sum(make_zeros(layer, checkpoint, experts).stored_bits for layer in layers)


def zero_weight(zeros: Tensor, grid: WeightScheme) -> QuantizedWeight:
    """A weight that dequantizes to exactly zero, from zeros (R, C) in the checkpoint's dtype."""
    weight: QuantizedWeight = RoundToNearest().quantize(zeros, None, grid).weight
    return weight


def shorten(architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """Content of config.json for a checkpoint with only the kept blocks.

    Properties that transformers derives from a block's number are written out, because the numbers change.
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
        # Number of Qwen's first blocks, which have full attention.
        text["max_window_layers"] = sum(block < text["max_window_layers"] for block in kept)
    if hasattr(architecture.config, "decoder_sparse_step"):
        # The config places mixtures at every decoder_sparse_step-th block, except for listed ones. Only the list can
        # describe what remains.
        text["decoder_sparse_step"] = 1
        text["mlp_only_layers"] = [place for place, block in enumerate(kept) if not _is_mixture(architecture, block)]
    return config | {"text_config": text} if nested else text


def _is_mixture(architecture: Architecture, block: int) -> bool:
    return any(layer.expert is not None for layer in architecture.linears(block))
