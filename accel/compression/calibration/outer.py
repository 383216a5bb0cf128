"""The output layer and the embedding as layers to compress: their levels, their groups, and their methods.

They make up one more block behind the last one, whose number is the number of blocks. Their levels are symmetric grids:
servers look up rows of a packed embedding without zero points only. An output layer is calibrated on the outputs of the
last norm; an embedding has no inputs, and is rounded to the grids of least squared error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from hasten.accel.compression.calibration.group_sizes import auto_group_sizes
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.formats.compressed_tensors import INTEGERS
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import EMBEDDING, HEAD, TIED, Architecture

_ROUNDED = RoundToNearest(search=24, shrink=0.4)


@dataclass(frozen=True)
class OuterLevels:
    """Levels of the output layer and of the embedding; () leaves the matrix as it is.

    A checkpoint has one level of each, a database any number. Where one tensor serves as both, the levels of one of
    them suffice.
    """

    head: tuple[Level, ...] = ()
    embedding: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            for level in getattr(self, field.name):
                scheme = level.loader_scheme
                if scheme is None or scheme.packing != INTEGERS or not scheme.weights.symmetric or scheme.inputs:
                    raise UserError(f"level {level.name} of the {field.name} is no symmetric grid, such as w8g128")

    def __bool__(self) -> bool:
        return bool(self.head or self.embedding)

    @property
    def levels(self) -> tuple[Level, ...]:
        """All levels, without duplicates."""
        return tuple(dict.fromkeys([*self.head, *self.embedding]))

    def names(self) -> dict[str, list[str]]:
        """Names of the levels, for JSON."""
        return {field.name: [level.name for level in getattr(self, field.name)] for field in fields(self)}


def make_outer_levels(
    head_bits: Sequence[int],
    embedding_bits: Sequence[int],
    head_group_size: int | str,
    embedding_group_size: int | str,
) -> OuterLevels:
    """Levels of output layer and embedding by their bits, ascending, all of the same group size."""
    return OuterLevels(
        tuple(GridLevel(Scheme(bits, head_group_size, symmetric=True)) for bits in sorted(set(head_bits))),
        tuple(GridLevel(Scheme(bits, embedding_group_size, symmetric=True)) for bits in sorted(set(embedding_bits))),
    )


def outer_groups(architecture: Architecture, outer: OuterLevels) -> list[Group]:
    """Groups of the matrices that are compressed, one each; UserError where a level does not fit."""
    groups = []
    for role, layer in architecture.outer_layers().items():
        levels = _levels_of(role, outer)
        size = auto_group_sizes([layer])[layer.name]
        for level in levels:
            level.check(layer.name, layer.columns)
        if levels:
            sized = tuple(dict.fromkeys(level.of_group_size(size) for level in levels))
            groups.append(Group(architecture.num_blocks, (layer,), sized[0], size, role, sized))
    return groups


def _levels_of(role: str, outer: OuterLevels) -> tuple[Level, ...]:
    if role != TIED:
        return outer.head if role == HEAD else outer.embedding
    if outer.head and outer.embedding and set(outer.head) != set(outer.embedding):
        names = ["/".join(level.name for level in levels) for levels in (outer.head, outer.embedding)]
        raise UserError(
            f"head_bits and embedding_bits give the levels {names[0]} and {names[1]}, but this model has one tensor "
            "for output layer and embedding: give equal values, or only one of the two"
        )
    return outer.head or outer.embedding


def outer_levels(groups: Sequence[Group]) -> OuterLevels:
    """The levels by which outer_groups makes these groups."""
    by_role = {group.role: group.levels for group in groups}
    return OuterLevels(by_role.get(HEAD, by_role.get(TIED, ())), by_role.get(EMBEDDING, ()))


def outer_method(group: Group, quantizer: Method) -> Method:
    """The method for a group of outer_groups: the quantizer for an output layer, and rounding for an embedding."""
    return _ROUNDED if group.role == EMBEDDING else quantizer


def at_level(group: Group, level: Level) -> Group:
    """The group with one level, for a checkpoint."""
    return replace(group, level=level, levels=(level,))


def is_outer(groups: Sequence[Group]) -> bool:
    """Whether these are groups of outer_groups, and not those of a block."""
    return bool(groups) and groups[0].role is not None


def needs_inputs(groups: Sequence[Group]) -> bool:
    """Whether a group of a block, or of outer_groups, has inputs: an embedding has none."""
    return any(group.role != EMBEDDING for group in groups)
