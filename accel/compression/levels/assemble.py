"""A checkpoint put together from a level database: every layer at the level that it was given, parts left out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from hasten.accel.compression.allocators.base import DROP
from hasten.accel.compression.calibration.layer_groups import Group, schemes
from hasten.accel.compression.formats.pack_quantized import PackQuantized
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.depth import ZEROS, Depth, Zeros, is_last, make_depth, make_zeros
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.result import Facts
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer

_NOTHING: Mapping[int, Collection[str]] = MappingProxyType({})


class MixedOutput(OutputFolder):
    """Folder of a mixture. depth: the blocks that are written. zeros: what stands for layers of dropped parts."""

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        layer_groups: list[list[Group]],
        depth: Depth,
        zeros: Sequence[Zeros],
    ) -> None:
        super().__init__(path, architecture, layer_groups, PackQuantized(), depth.kept)
        self.architecture = architecture
        self.depth = depth
        self.zeros = {each.layer.name: each for each in zeros}


def mixed_output(
    architecture: Architecture,
    database: LevelDatabase,
    levels: Mapping[str, str],
    path: Path,
    dropped: Mapping[int, Collection[str]] = _NOTHING,
) -> MixedOutput:
    """Folder of the checkpoint with these levels, by layer; layers at `keep`, and those without one, stay as they are.

    dropped: kinds of parts, out of `attention`, `mlp` and `block`, that are left out, by block; the levels of their
    layers are not read. UserError where transformers could not read the mixture, or where no block would stay.
    """
    depth = make_depth(architecture, dropped)
    grids = _grids(database, levels)
    experts = _grid_of_experts(architecture, grids, depth)
    zeros = _zeros(architecture, database, depth, experts)
    loaded = grids | {each.layer.name: GridLevel(each.scheme) for each in zeros if each.scheme is not None}
    layer_groups: list[list[Group]] = [[] for _ in range(architecture.num_blocks)]
    for block in depth.kept:
        cut: dict[tuple[str, Level], list[Layer]] = {}
        for layer in architecture.linears(block):
            if layer.name in loaded:
                cut.setdefault((layer.group, loaded[layer.name]), []).append(layer)
        layer_groups[block] = [Group(block, tuple(layers), level) for (_, level), layers in cut.items()]
    if experts is None and any(layer_groups):
        raise UserError(
            "experts got no level of quantization, and other layers did: transformers cannot load such a mixture"
        )
    if zeros and not all(scheme.symmetric for scheme in schemes(layer_groups).values()):
        raise UserError(
            "attention and MLP parts cannot be dropped next to levels with zero points, which transformers reads only "
            "where all layers have the same bits: use symmetric levels, or drop whole blocks"
        )
    return MixedOutput(path, architecture, layer_groups, depth, zeros)


def write_mixed(
    output: MixedOutput,
    database: LevelDatabase,
    levels: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> list[Facts]:
    """Write every block that is not there yet and finish; returns the facts of all layers. progress(blocks done).

    Facts go by blocks and layers of the original. A layer of a dropped part has the level `drop`.
    """
    found = []
    for block, groups in enumerate(database.layer_groups):
        layers = [layer for group in groups for layer in group.layers]
        if block not in output.depth.kept:
            found += [_dropped(block, layer, None) for layer in layers]
        else:
            if not output.is_finished(block):
                _write_block(output, database, levels, block)
            found += output.facts(block)
        if progress:
            progress(block + 1)
    if not output.is_complete:
        output.finish()
    return found


def _write_block(output: MixedOutput, database: LevelDatabase, levels: Mapping[str, str], block: int) -> None:
    packed: dict[str, dict[str, Tensor]] = {}
    facts = []
    for layer in output.architecture.linears(block):
        name, level = layer.name, levels.get(layer.name, KEEP)
        if name in output.zeros:
            zeros = output.zeros[name]
            packed[name] = zeros.parts(output.architecture.checkpoint, output.format.pack)
            facts.append(_dropped(block, layer, zeros))
        elif level != KEEP:
            packed[name] = database.written(name, level)
            facts.append(database.facts(name)[level])
    output.write_block(block, packed, facts)


def _dropped(block: int, layer: Layer, zeros: Zeros | None) -> Facts:
    """Facts of a layer of a dropped part; zeros is None in a block that is left out."""
    weights = layer.rows * layer.columns
    bits, stored = 0, 0
    if zeros is not None:
        bits, stored = zeros.scheme.bits if zeros.scheme else 8 * zeros.itemsize, zeros.stored_bits
    return {
        "layer": layer.name,
        "block": block,
        "level": DROP,
        "bits": bits,
        "weights": weights,
        "stored_bits": stored,
        "bits_per_weight": stored / weights,
        # Nothing of its output is left.
        "error": 1.0,
        "notes": [],
    }


def _grids(database: LevelDatabase, levels: Mapping[str, str]) -> dict[str, Level]:
    """Levels of the layers that loaders read as codes; ValueError names a level that the database does not have."""
    found: dict[str, Level] = {}
    for groups in database.layer_groups:
        for group in groups:
            known: dict[str, Level | None] = {KEEP: None, **dict(database.levels_of(group))}
            for layer in group.layers:
                name = levels.get(layer.name, KEEP)
                if name not in known:
                    raise ValueError(f"level {name} of {layer.name} is none of {', '.join(known)}")
                level = known[name]
                # All others are dense in the checkpoint.
                if level is not None and level.loader_scheme is not None:
                    found[layer.name] = level
    return found


def _zeros(architecture: Architecture, database: LevelDatabase, depth: Depth, experts: Scheme | None) -> list[Zeros]:
    """What stands for layers of dropped parts; those that the database lacks stay where that makes no difference."""
    known = {layer.name for groups in database.layer_groups for group in groups for layer in group.layers}
    found = []
    for block in depth.zeros:
        for layer in architecture.linears(block):
            if depth.is_zero(block, layer):
                zeros = make_zeros(layer, architecture.checkpoint, experts)
                if layer.name in known or layer.expert is not None:
                    found.append(zeros)
                elif is_last(layer):
                    found.append(replace(zeros, scheme=None))
    return found


def _grid_of_experts(architecture: Architecture, grids: Mapping[str, Level], depth: Depth) -> Scheme | None:
    """Scheme of all experts that are not dropped, None where they are plain; UserError where they differ."""
    found = {
        grids[layer.name].loader_scheme if layer.name in grids else None
        for block in depth.kept
        for layer in architecture.linears(block)
        if layer.expert is not None and not depth.is_zero(block, layer)
    }
    if len(found) > 1:
        levels = ", ".join(sorted(f"w{scheme.bits}" if scheme else "none" for scheme in found))
        raise UserError(f"experts got several levels ({levels}): transformers reads one for the experts of all blocks")
    return found.pop() if found else ZEROS
