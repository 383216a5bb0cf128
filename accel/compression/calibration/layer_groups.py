"""Groups of layers that are compressed together, and the level of each; checked before anything is written."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hasten.accel.compression.calibration.group_sizes import auto_group_sizes, check_group_size
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.levels.base import AutoSize, Level
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer


@dataclass(frozen=True)
class Group:
    """Layers of one block that share an input and are solved together.

    layers: in the order in which their rows are stacked. level: at which all of them are stored. auto_size: of levels
    whose group size is `auto`. role, levels: role of a matrix outside the blocks, see calibration/outer.py, and all
    levels that it can have, which are its own; None and () for layers of a block.
    """

    block: int
    layers: tuple[Layer, ...]
    level: Level
    auto_size: AutoSize = field(default=AutoSize())
    role: str | None = None
    levels: tuple[Level, ...] = ()

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

    def level_of(self, level: Level) -> Level:
        """The level of these layers where the model has this one: for experts, and of the layers' own group size."""
        return (level.of_expert() if self.is_expert else level).of_group_size(self.auto_size)

    @property
    def cost(self) -> float:
        """Relative time of the solve: factorisation and updates of the columns."""
        return self.columns**3 / 3 + sum(layer.rows for layer in self.layers) * self.columns**2


def make_layer_groups(
    architecture: Architecture,
    level: Level,
    ignore: Iterable[str],
    skip_first: int,
    skip_last: int,
    others: Iterable[Level] = (),
) -> list[list[Group]]:
    """Groups of every block.

    ignore: regular expressions searched in layer names; layers that match are not compressed. skip_first, skip_last:
    numbers of blocks that are not compressed at either end. Experts get level.of_expert(), and levels whose group size
    is `auto` get the size of the layer. others: further levels that the layers must be able to have.
    """
    for name, value in (("skip_first", skip_first), ("skip_last", skip_last)):
        if not 0 <= value <= architecture.num_blocks:
            raise UserError(f"{name}={value} is out of range: the model has {architecture.num_blocks} blocks")
    patterns = [(text, _compile(text)) for text in ignore]
    used: set[str] = set()
    blocks: list[list[Layer]] = []
    for block in range(architecture.num_blocks):
        layers = []
        if skip_first <= block < architecture.num_blocks - skip_last:
            for layer in architecture.linears(block):
                hits = [text for text, pattern in patterns if pattern.search(layer.name)]
                used.update(hits)
                if not hits:
                    layers.append(layer)
        blocks.append(layers)
    outer = {name.removesuffix(".weight") for name in architecture.outer_tensors()}
    for text, pattern in patterns:
        if text not in used and not any(pattern.search(name) for name in outer):
            raise UserError(f"ignore={text!r} matches no layer; a layer is named like {_example(architecture)}")
    if not any(blocks):
        raise UserError("no layer is left to quantize: ignore, skip_first and skip_last exclude all of them")
    _check_levels([layer for layers in blocks for layer in layers], list(dict.fromkeys([level, *others])))
    return join_layers(blocks, level)


def join_layers(blocks: Sequence[Sequence[Layer]], level: Level) -> list[list[Group]]:
    """Groups of every block from the layers of every block, which are all that are compressed, at a level."""
    sizes = auto_group_sizes([layer for layers in blocks for layer in layers])
    groups: list[list[Group]] = []
    for block, layers in enumerate(blocks):
        shared: dict[str, list[Layer]] = {}
        for layer in layers:
            shared.setdefault(layer.group, []).append(layer)
        unsized = [Group(block, tuple(members), level, sizes[members[0].name]) for members in shared.values()]
        groups.append([replace(group, level=group.level_of(level)) for group in unsized])
    return groups


def _check_levels(layers: Sequence[Layer], levels: Iterable[Level]) -> None:
    """UserError where layers cannot have one of the levels."""
    for level in levels:
        check_group_size(level, layers)
        for layer in layers:
            level.check(layer.name, layer.columns)


def common_levels(levels: Iterable[Level], layer_groups: Iterable[Iterable[Group]]) -> tuple[Level, ...]:
    """Levels of a database, whose names all layers share, without duplicates.

    A group size of `auto` stays in the name only where it stands for several sizes.
    """
    groups = [group for block in layer_groups for group in block if group.role is None]
    named = []
    for level in levels:
        sized = {level.of_group_size(group.auto_size) for group in groups}
        named.append(sized.pop() if len(sized) == 1 else level)
    return tuple(dict.fromkeys(named))


def group_sizes(level: Level, layer_groups: Iterable[Iterable[Group]]) -> dict[str, int]:
    """Group size of a level in every layer of the blocks, by layer name; empty where the level has no grid."""
    sizes: dict[str, int] = {}
    for group in (group for groups in layer_groups for group in groups if group.role is None):
        scheme = group.level_of(level).loader_scheme
        if scheme is not None:
            size = scheme.weights.group_size
            assert isinstance(size, int)
            sizes |= {layer.name: size for layer in group.layers}
    return sizes


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"ignore={text!r} is no regular expression: {error}") from None


def _example(architecture: Architecture) -> str:
    return architecture.linears(0)[0].name


def schemes(layer_groups: Iterable[Iterable[Group]]) -> Mapping[str, LoaderScheme]:
    """Scheme of every layer that loaders read as codes on a grid, by layer name, in the order of the model."""
    return {
        layer.name: group.level.loader_scheme
        for block in layer_groups
        for group in block
        for layer in group.layers
        if group.level.loader_scheme is not None
    }
