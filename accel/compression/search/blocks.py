"""A model's blocks in memory, whose weights can be swapped in place and whose parts can be dropped."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from hasten.accel.activations.hooks import set_inputs
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.compression.allocators.base import ATTENTION, BLOCK, DROP, MLP, Unit
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.models.architecture import Architecture

# Key beside the names of units: whether keys and values are rounded as the level database says.
KV_CACHE, ROUNDED = "kv_cache", "rounded"


class StoredRoundings(Protocol):
    """How servers round inputs, keys and values, as a level database knows it.

    inputs(layer, level): None where a layer's inputs are not rounded at a level. attentions: names of the attentions
    whose keys and values are, by block. read_attention(attention): see Architecture.round_attention.
    """

    attentions: Mapping[int, str]

    def inputs(self, layer: str, level: str) -> InputRounding | None:
        """See above."""

    def read_attention(self, attention: str) -> Mapping[str, InputRounding]:
        """See above."""


class BlockState(NamedTuple):
    """Levels and dropped parts of a block; blocks of equal state compute the same function.

    dropped: kinds of the dropped parts. levels: level of each slot, empty where the slot is in a dropped part.
    kv_cache: ROUNDED, or KEEP where keys and values are as they are.
    """

    dropped: tuple[str, ...]
    levels: tuple[str, ...]
    kv_cache: str = KEEP


@dataclass
class Slot:
    """A layer whose level changes. unit: name of its unit. around: names of the parts around it. level: loaded now."""

    name: str
    linear: nn.Linear
    unit: str
    around: tuple[str, ...]
    level: str = KEEP


class Block:
    """A block in memory; module is a decoder layer of transformers.

    slots: its layers whose levels change. parts: (name of the unit, kind) of the parts that can be dropped. state: the
    loaded state. stored: None where neither inputs nor keys and values are rounded at any level. index: its number.
    """

    def __init__(self, architecture: Architecture, index: int, stored: StoredRoundings | None = None) -> None:
        self.module = architecture.load_block(index)
        self._architecture, self._index, self._stored = architecture, index, stored
        self.slots: list[Slot] = []
        self.parts: list[tuple[str, str]] = []
        self.state = BlockState((), ())

    def state_of(self, levels: dict[str, str]) -> BlockState:
        """State of this block for the given levels, by names of all units of the model."""
        dropped = {kind for name, kind in self.parts if levels[name] == DROP}
        if BLOCK in dropped:
            return BlockState((BLOCK,), ())
        rounds = self._stored is not None and self._index in self._stored.attentions
        return BlockState(
            tuple(sorted(dropped)),
            tuple(
                "" if any(levels[part] == DROP for part in slot.around) else levels[slot.unit] for slot in self.slots
            ),
            levels.get(KV_CACHE, KEEP) if rounds else KEEP,
        )

    def round_inputs(self, slot: Slot, level: str) -> None:
        """Round the inputs of a layer as at a level."""
        if self._stored is not None:
            set_inputs(slot.linear, None if level == KEEP else self._stored.inputs(slot.name, level))

    def round_attention(self, kv_cache: str) -> None:
        """Round keys and values, or leave them as they are, KEEP."""
        if self._stored is None or self._index not in self._stored.attentions:
            return
        name = self._stored.attentions[self._index]
        roundings = self._stored.read_attention(name) if kv_cache == ROUNDED else {}
        self._architecture.round_attention(self.module, roundings)

    def drop(self, kinds: tuple[str, ...]) -> None:
        """Replace the forward of the dropped parts, and restore that of the others; a dropped block is not run at all.

        Dropped parts take no time, and their zeros stay zeros in the norms that Gemma has behind both parts.
        """
        for kind in (ATTENTION, MLP):
            for name, forward in _DROPPED_FORWARDS[kind].items():
                module = getattr(self.module, name, None)
                if module is not None and kind in kinds:
                    vars(module)["forward"] = forward
                elif module is not None:
                    vars(module).pop("forward", None)


def _zeros(hidden_states: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


def _no_attention(hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


# Forward of the modules of a dropped part. OPT's feed-forward network is two layers of the block itself.
_DROPPED_FORWARDS: dict[str, dict[str, Callable[..., object]]] = {
    ATTENTION: {"self_attn": _no_attention},
    MLP: {"mlp": _zeros, "fc1": lambda hidden_states: hidden_states, "fc2": _zeros},
}


class WeightCache:
    """Cache of weights that are swapped out, by layer and level; above `limit` bytes the oldest are evicted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._tensors: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def take(self, key: tuple[str, str]) -> Tensor | None:
        """Remove and return a tensor; None where it is not cached."""
        tensor = self._tensors.pop(key, None)
        self.bytes -= 0 if tensor is None else tensor.nbytes
        return tensor

    def put(self, key: tuple[str, str], tensor: Tensor) -> None:
        """Add a tensor that is not cached yet."""
        self._tensors[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._tensors.popitem(last=False)[1].nbytes


def load_blocks(
    architecture: Architecture, units: Sequence[Unit], stored: StoredRoundings | None = None
) -> list[Block]:
    """All blocks with the original weights; ValueError names a unit that does not fit the model."""
    check_units(architecture, units)
    return [load_block(architecture, units, index, stored) for index in range(architecture.num_blocks)]


def load_block(
    architecture: Architecture, units: Sequence[Unit], index: int, stored: StoredRoundings | None = None
) -> Block:
    """One block with the original weights, for units that check_units accepts."""
    block = Block(architecture, index, stored)
    paths = {layer.name: layer.module for layer in architecture.linears(index)}
    parents = {unit.name: unit.part_of for unit in units}
    for unit in units:
        around, name = [], unit.part_of
        while name is not None:
            around.append(name)
            name = parents[name]
        for layer in unit.layers:
            if layer in paths:
                # The class may be another one, but it has a weight (R, C).
                linear = cast(nn.Linear, block.module.get_submodule(paths[layer]))
                block.slots.append(Slot(layer, linear, unit.name, tuple(around)))
        if not unit.layers and unit.block == index:
            block.parts.append((unit.name, unit.kind))
    block.state = block.state_of(dict.fromkeys(parents, KEEP))
    return block


def check_units(architecture: Architecture, units: Sequence[Unit]) -> None:
    """ValueError, which names the unit, where a unit does not fit the model, or has a layer of an earlier unit."""
    free = {layer.name for index in range(architecture.num_blocks) for layer in architecture.linears(index)}
    free |= {layer.name for layer in architecture.outer_layers().values()}
    for unit in units:
        for layer in unit.layers:
            if layer not in free:
                where = architecture.checkpoint.path
                raise ValueError(f"{unit.name}: {layer} is no linear layer of {where}, or that of an earlier unit")
            free.remove(layer)
        is_part = unit.kind in (ATTENTION, MLP, BLOCK) and 0 <= unit.block < architecture.num_blocks
        if not unit.layers and not is_part:
            raise ValueError(f"{unit.name} has no layers, and is no part of a block: {unit.kind} of {unit.block}")
