"""A checkpoint put together from a level database: every layer at the level that it was given."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.compression.formats.pack_quantized import PackQuantized
from accel.compression.levels.database import LevelDatabase
from accel.compression.levels.level import KEEP
from accel.compression.output import OutputFolder
from accel.compression.plan import Group
from accel.errors import UserError
from accel.models.architecture import Architecture, Layer


def mixed_output(
    architecture: Architecture, database: LevelDatabase, levels: Mapping[str, str], path: Path
) -> OutputFolder:
    """Folder of the checkpoint with these levels, by layer; layers at `keep`, and those without one, stay as they are.

    UserError where no loader could read the mixture: transformers has one scheme for the experts of all blocks.
    """
    plan = [_mixed(database, groups, levels) for groups in database.plan]
    experts = {group.scheme for groups in plan for group in groups if group.is_expert}
    if len(experts) > 1:
        found = ", ".join(sorted({f"w{scheme.bits}" for scheme in experts}))
        raise UserError(f"experts got several levels ({found}): transformers reads one for the experts of all blocks")
    return OutputFolder(path, architecture, plan, PackQuantized())


def write_mixed(
    output: OutputFolder,
    database: LevelDatabase,
    levels: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write every block that is not there yet and finish; returns the facts of all layers. progress(blocks done)."""
    for block, groups in enumerate(database.plan):
        if not output.is_finished(block):
            names = [layer.name for group in groups for layer in group.layers if levels.get(layer.name, KEEP) != KEEP]
            packed = {name: database.parts(name, levels[name]) for name in names}
            output.write_block(block, packed, [database.facts(name)[levels[name]] for name in names])
        if progress:
            progress(block + 1)
    if not output.is_complete:
        output.finish()
    return [row for block in range(len(database.plan)) for row in output.facts(block)]


def _mixed(database: LevelDatabase, groups: Sequence[Group], levels: Mapping[str, str]) -> list[Group]:
    """The groups of a block, cut by level."""
    found = []
    for group in groups:
        schemes = dict(database.schemes_of(group))
        by_level: dict[str, list[Layer]] = {}
        for layer in group.layers:
            level = levels.get(layer.name, KEEP)
            if level != KEEP:
                by_level.setdefault(level, []).append(layer)
        found += [Group(group.block, tuple(layers), schemes[level]) for level, layers in by_level.items()]
    return found
