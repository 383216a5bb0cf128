"""Groups of layers that are compressed together, and the level of each; checked before anything is written."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer


@dataclass(frozen=True)
class Group:
    """Layers of one block that share an input and are solved together.

    layers: in the order in which their rows are stacked. level: at which all of them are stored.
    """

    block: int
    layers: tuple[Layer, ...]
    level: Level

    @property
    def key(self) -> str:
        """Name of the group, unique in its run."""
        return self.layers[0].name

    @property
    def columns(self) -> int:
        """Input columns of every layer in the group."""
        return self.layers[0].columns

    @property
    def is_expert(self) -> bool:
        """Whether the layers belong to one expert, which sees only the tokens routed to it."""
        return self.layers[0].expert is not None

    @property
    def cost(self) -> float:
        """Relative time of the solve: factorisation and updates of the columns."""
        return self.columns**3 / 3 + sum(layer.rows for layer in self.layers) * self.columns**2


def make_layer_groups(
    architecture: Architecture, level: Level, ignore: Iterable[str], skip_first: int, skip_last: int
) -> list[list[Group]]:
    """Groups of every block.

    ignore: regular expressions searched in layer names; layers that match are not compressed. skip_first, skip_last:
    numbers of blocks that are not compressed at either end. Experts get level.of_expert().
    """
    for name, value in (("skip_first", skip_first), ("skip_last", skip_last)):
        if not 0 <= value <= architecture.num_blocks:
            raise UserError(f"{name}={value} is out of range: the model has {architecture.num_blocks} blocks")
    patterns = [(text, _compile(text)) for text in ignore]
    used: set[str] = set()
    blocks: list[list[Group]] = []
    for block in range(architecture.num_blocks):
        shared: dict[tuple[str, Level], list[Layer]] = {}
        if skip_first <= block < architecture.num_blocks - skip_last:
            for layer in architecture.linears(block):
                hits = [text for text, pattern in patterns if pattern.search(layer.name)]
                used.update(hits)
                if hits:
                    continue
                layer_level = level if layer.expert is None else level.of_expert()
                layer_level.check(layer.name, layer.columns)
                shared.setdefault((layer.group, layer_level), []).append(layer)
        blocks.append([Group(block, tuple(layers), group_level) for (_, group_level), layers in shared.items()])
    outer = {name.removesuffix(".weight") for name in architecture.outer_tensors()}
    for text, pattern in patterns:
        if text not in used and not any(pattern.search(name) for name in outer):
            raise UserError(f"ignore={text!r} matches no layer; a layer is named like {_example(architecture)}")
    if not any(blocks):
        raise UserError("no layer is left to quantize: ignore, skip_first and skip_last exclude all of them")
    return blocks


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"ignore={text!r} is no regular expression: {error}") from None


def _example(architecture: Architecture) -> str:
    return architecture.linears(0)[0].name


def schemes(layer_groups: Iterable[Iterable[Group]]) -> Mapping[str, Scheme]:
    """Scheme of every layer that loaders read as codes on a grid, by layer name, in the order of the model."""
    return {
        layer.name: group.level.loader_scheme
        for block in layer_groups
        for group in block
        for layer in group.layers
        if group.level.loader_scheme is not None
    }
