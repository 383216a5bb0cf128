"""Assembly of a checkpoint from a level database: every layer at its assigned level, without the dropped parts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.allocators.base import BLOCK, DROP
from hasten.accel.compression.calibration.layer_groups import Group, schemes
from hasten.accel.compression.calibration.outer import at_level, is_outer
from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.depth import ZEROS, Depth, Zeros, is_last, make_depth, make_zeros
from hasten.accel.compression.levels.level import KEEP
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.compression.outputs.gguf import GgufFolder, GgufOptions
from hasten.accel.compression.result import Facts
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer

_NOTHING: Mapping[int, Collection[str]] = MappingProxyType({})


class MixedOutput(OutputFolder):
    """Folder of an assembled checkpoint. depth: the blocks that are written. zeros: of layers in dropped parts."""

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        layer_groups: list[list[Group]],
        depth: Depth,
        zeros: Sequence[Zeros],
        attention: AttentionScheme | None = None,
    ) -> None:
        super().__init__(path, architecture, layer_groups, CompressedTensors(), depth.kept, attention)
        self.architecture = architecture
        self.depth = depth
        self.zeros = {layer_zeros.layer.name: layer_zeros for layer_zeros in zeros}


class MixedGguf(GgufFolder):
    """Folder of an assembled GGUF file. depth: the blocks that are written."""

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        layer_groups: list[list[Group]],
        depth: Depth,
        options: GgufOptions,
    ) -> None:
        super().__init__(path, architecture, layer_groups, options, depth.kept)
        self.architecture = architecture
        self.depth = depth


def mixed_gguf(
    architecture: Architecture,
    database: LevelDatabase,
    levels: Mapping[str, str],
    path: Path,
    options: GgufOptions,
    dropped: Mapping[int, Collection[str]] = _NOTHING,
) -> MixedGguf:
    """Folder for the GGUF file with these levels; see mixed_output. Only whole blocks can be dropped."""
    if any(kind != BLOCK for kinds in dropped.values() for kind in kinds):
        raise UserError("drop=[attention] and drop=[mlp] leave blocks that llama.cpp has no form for: use drop=[block]")
    if is_outer(database.layer_groups[-1]):
        raise UserError(
            f"levels={database.path} has levels of output layer or embedding, which have types of their own in a GGUF "
            "file: build the levels without head_bits and embedding_bits"
        )
    depth = make_depth(architecture, dropped)
    layer_groups: list[list[Group]] = [[] for _ in range(architecture.num_blocks)]
    for block in depth.kept:
        for group in database.layer_groups[block]:
            known = dict(database.levels_of(group))
            shared: dict[str, list[Layer]] = {}
            for layer in group.layers:
                name = levels.get(layer.name, KEEP)
                if name != KEEP:
                    shared.setdefault(name, []).append(layer)
            layer_groups[block] += [
                replace(group, layers=tuple(layers), level=known[name]) for name, layers in shared.items()
            ]
    return MixedGguf(path, architecture, layer_groups, depth, options)


def mixed_output(
    architecture: Architecture,
    database: LevelDatabase,
    levels: Mapping[str, str],
    path: Path,
    dropped: Mapping[int, Collection[str]] = _NOTHING,
) -> MixedOutput:
    """Folder for the checkpoint with these levels, by layer; layers at `keep` or without a level stay uncompressed.

    dropped: dropped kinds of parts (`attention`, `mlp`, `block`), by block; the levels of their layers are not read.
    UserError where transformers could not load the checkpoint, or where no block would stay.
    """
    depth = make_depth(architecture, dropped)
    grids = _grids(database, levels)
    experts = _level_of_experts(architecture, grids, depth)
    zeros = _zeros(architecture, database, depth, experts)
    loaded = grids | {
        layer_zeros.layer.name: layer_zeros.level for layer_zeros in zeros if layer_zeros.level is not None
    }
    layer_groups: list[list[Group]] = [[] for _ in range(architecture.num_blocks)]
    for block in depth.kept:
        shared: dict[tuple[str, Level], list[Layer]] = {}
        for layer in architecture.linears(block):
            if layer.name in loaded:
                shared.setdefault((layer.group, loaded[layer.name]), []).append(layer)
        layer_groups[block] = [Group(block, tuple(layers), level) for (_, level), layers in shared.items()]
    matrices = [group for groups in database.layer_groups for group in groups if group.role is not None]
    outer = [at_level(group, loaded[group.key]) for group in matrices if group.key in loaded]
    if outer:
        layer_groups.append(outer)
    if experts is None and any(layer_groups):
        raise UserError(
            "experts got no level of quantization, and other layers did: transformers cannot load such a checkpoint"
        )
    if zeros and not all(scheme.weights.symmetric for scheme in schemes(layer_groups).values()):
        raise UserError(
            "attention and MLP parts cannot be dropped next to levels with zero points, which transformers reads only "
            "where all layers have the same bits: use symmetric levels, or drop whole blocks"
        )
    return MixedOutput(path, architecture, layer_groups, depth, zeros, database.attention)


def write_mixed(
    output: MixedOutput | MixedGguf,
    database: LevelDatabase,
    levels: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> list[Facts]:
    """Write the blocks that are missing, and finish the folder; returns the facts of all layers.

    progress(n) is called after n blocks. Facts name blocks and layers of the original. A layer of a dropped part has
    the level `drop`.
    """
    facts = []
    for block, groups in enumerate(database.layer_groups):
        layers = [layer for group in groups for layer in group.layers]
        if is_outer(groups):
            assert isinstance(output, MixedOutput), "a GGUF file has other types for these matrices"
            facts += _outer(output, database, levels, block, layers)
        elif block not in output.depth.kept:
            facts += [_dropped(block, layer, None) for layer in layers]
        else:
            if not output.is_finished(block):
                _write_block(output, database, levels, block)
            facts += output.facts(block)
        if progress:
            progress(block + 1)
    if not output.is_complete:
        output.finish()
    return facts


def _write_block(
    output: MixedOutput | MixedGguf, database: LevelDatabase, levels: Mapping[str, str], block: int
) -> None:
    read = database.checkpoint_tensors if isinstance(output, MixedOutput) else database.parts
    packed: dict[str, dict[str, Tensor]] = {}
    facts = []
    for layer in output.architecture.linears(block):
        name, level = layer.name, levels.get(layer.name, KEEP)
        if isinstance(output, MixedOutput) and name in output.zeros:
            zeros = output.zeros[name]
            packed[name] = zeros.parts(output.architecture.checkpoint, output.format)
            facts.append(_dropped(block, layer, zeros))
        elif level != KEEP:
            packed[name] = read(name, level)
            facts.append(database.facts(name)[level])
    if block in database.attentions:
        attention = database.attentions[block]
        packed[attention] = database.attention_tensors(attention)
    output.write_block(block, packed, facts)


def _outer(
    output: MixedOutput, database: LevelDatabase, levels: Mapping[str, str], block: int, layers: Sequence[Layer]
) -> list[Facts]:
    """Write the matrices outside the blocks that are compressed, where they are missing; returns their facts."""
    packed = [layer.name for layer in layers if levels.get(layer.name, KEEP) != KEEP]
    if not packed:
        return []
    if not output.is_finished(block):
        tensors = {name: database.checkpoint_tensors(name, levels[name]) for name in packed}
        output.write_block(block, tensors, [database.facts(name)[levels[name]] for name in packed])
    return output.facts(block)


def _dropped(block: int, layer: Layer, zeros: Zeros | None) -> Facts:
    """Facts of a layer in a dropped part; zeros is None where the whole block is dropped."""
    weights = layer.rows * layer.columns
    bits, stored = 0, 0
    if zeros is not None:
        bits = zeros.scheme.weights.bits if zeros.scheme else 8 * zeros.itemsize
        stored = zeros.stored_bits
    return {
        "layer": layer.name,
        "block": block,
        "level": DROP,
        "bits": bits,
        "weights": weights,
        "stored_bits": stored,
        "bits_per_weight": stored / weights,
        # All of the output is lost.
        "error": 1.0,
        "notes": [],
    }


def _grids(database: LevelDatabase, levels: Mapping[str, str]) -> dict[str, Level]:
    """Levels of the layers that loaders read as codes; ValueError names a level that is not in the database."""
    grids: dict[str, Level] = {}
    for groups in database.layer_groups:
        for group in groups:
            known: dict[str, Level | None] = {KEEP: None, **dict(database.levels_of(group))}
            for layer in group.layers:
                name = levels.get(layer.name, KEEP)
                if name not in known:
                    raise ValueError(f"level {name} of {layer.name} is none of {', '.join(known)}")
                level = known[name]
                # Layers at other levels are dense in the checkpoint.
                if level is not None and level.loader_scheme is not None:
                    grids[layer.name] = level
    return grids


def _zeros(architecture: Architecture, database: LevelDatabase, depth: Depth, experts: Level | None) -> list[Zeros]:
    """Zeros of the layers in dropped parts; layers that the database lacks are zeroed only where they are the last."""
    known = {layer.name for groups in database.layer_groups for group in groups for layer in group.layers}
    all_zeros = []
    for block in depth.zeros:
        for layer in architecture.linears(block):
            if depth.is_zero(block, layer):
                zeros = make_zeros(layer, architecture.checkpoint, experts)
                if layer.name in known or layer.expert is not None:
                    all_zeros.append(zeros)
                elif is_last(layer):
                    all_zeros.append(replace(zeros, level=None))
    return all_zeros


def _level_of_experts(architecture: Architecture, grids: Mapping[str, Level], depth: Depth) -> Level | None:
    """Level of all experts that are not dropped, None where they are dense; UserError where loaders see two of them."""
    in_use: dict[LoaderScheme | None, Level | None] = {}
    for block in depth.kept:
        for layer in architecture.linears(block):
            if layer.expert is not None and not depth.is_zero(block, layer):
                level = grids.get(layer.name)
                in_use.setdefault(None if level is None else level.loader_scheme, level)
    if len(in_use) > 1:
        levels = ", ".join(sorted("none" if level is None else level.name for level in in_use.values()))
        raise UserError(f"experts got several levels ({levels}): transformers reads one for the experts of all blocks")
    return next(iter(in_use.values())) if in_use else ZEROS
