"""The level database: every layer at every level, as codes or as mask and values, with the errors of the levels.

There is one file a layer, written by the process that solved the layer: a resumed run solves the layers without a file.
Files are memory-mapped, so that a search reads only the levels that it uses.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from safetensors import safe_open
from torch import Tensor

from hasten.accel.activations.description import INPUT_TENSORS, input_rounding
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration.layer_groups import Group, join_layers
from hasten.accel.compression.calibration.outer import OuterLevels, outer_groups, outer_levels
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.result import Facts
from hasten.accel.compression.transforms.checkpoint import TransformedCheckpoint
from hasten.accel.compression.transforms.edits import EditFolder
from hasten.accel.compression.transforms.rotating import rotated
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.outputs.resumable import PROGRESS, ResumableFolder

_LAYERS = "layers"
_FACTS = "facts"
# Level of the groups of a database without levels; it is never used.
_UNUSED = "w8"
# In place of a level: the scales of an attention's keys and values.
_ATTENTION = "attention"
_NOTHING: Mapping[int, str] = MappingProxyType({})


class LevelDatabase(ResumableFolder):
    """A level database, finished or not.

    checkpoint: as the transforms make it. propagated: level on whose outputs the next block is calibrated; None where
    the original's outputs are used, and in a database that was read. attention: how keys and values are rounded, at all
    levels alike; None where they are not. attentions: names of the attentions whose keys and values are, by block.
    transformed: blocks that transforms edit, None where there are no transforms; the edits are in the folder `edits`.
    """

    edits: ClassVar[str] = "transforms"
    option = "levels"
    last_file = "database.json"
    open_to_all = ("searches",)

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        layer_groups: Sequence[Sequence[Group]],
        levels: Sequence[Level],
        propagated: Level | None,
        attention: AttentionScheme | None = None,
        attentions: Mapping[int, str] = _NOTHING,
        transformed: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, checkpoint.path)
        self.layer_groups = layer_groups
        self.checkpoint = checkpoint
        self._levels = tuple(levels)
        self._propagated = propagated
        self.attention, self.attentions = attention, attentions
        self._groups = {layer.name: group for groups in layer_groups for group in groups for layer in group.layers}
        self._transformed = transformed

    @classmethod
    def read(cls, path: Path, architecture: Architecture) -> "LevelDatabase":
        """A finished database; UserError where it is not finished or was made from another checkpoint.

        architecture: of the checkpoint that `checkpoint_of` returns.
        """
        file, checkpoint = path / cls.last_file, architecture.checkpoint
        if isinstance(checkpoint, TransformedCheckpoint):
            checkpoint.locate(architecture)
        if not file.is_file():
            state = "is not finished: run hasten levels again" if (path / PROGRESS).is_dir() else "is no level database"
            raise UserError(f"levels={path} {state}")
        content = json.loads(file.read_text())
        if content["checkpoint"] != checkpoint.fingerprint():
            raise UserError(f"levels={path} was made from another checkpoint than model={checkpoint.path}")
        levels = [parse_level(name) for name in content["levels"]]
        level = levels[0] if levels else parse_level(_UNUSED)
        outer = OuterLevels(*map(_parsed, content["outer"].values())) if content.get("outer") else OuterLevels()
        layers = set(content["layers"])
        blocks = [
            [layer for layer in architecture.linears(block) if layer.name in layers]
            for block in range(architecture.num_blocks)
        ]
        layer_groups = join_layers(blocks, level)
        if outer:
            layer_groups.append(outer_groups(architecture, outer))
        attention = AttentionScheme(**content["attention"]) if content.get("attention") else None
        attentions = attention_names(architecture) if attention is not None else {}
        return cls(path, checkpoint, layer_groups, levels, None, attention, attentions, content.get("transformed"))

    @classmethod
    def checkpoint_of(cls, path: Path, checkpoint: Path) -> Checkpoint:
        """The checkpoint that the database at `path` was made from, as its transforms left it.

        checkpoint: folder of the original. A database that is not finished has no transforms yet.
        """
        file = path / cls.last_file
        transformed = json.loads(file.read_text()).get("transformed") if file.is_file() else None
        source = rotated(Checkpoint(checkpoint), path / cls.edits) if file.is_file() else Checkpoint(checkpoint)
        if transformed is None:
            return source
        return TransformedCheckpoint(source, EditFolder(path / cls.edits, transformed))

    @property
    def levels(self) -> list[str]:
        """Names of the levels."""
        return [level.name for level in self._levels]

    def levels_of(self, group: Group) -> list[tuple[str, Level]]:
        """Names and levels of a group. A group's level may differ from the one of that name; see Group.level_of."""
        return [(level.name, group.level_of(level)) for level in group.levels or self._levels]

    def stored_bits(self, group: Group, layer: Layer, level: Level) -> int:
        """Exact size of a layer of a group at one of levels_of(group); known before the layer is solved."""
        itemsize = self.checkpoint.dtype(f"{layer.name}.weight").itemsize
        return level.stored_bits(layer.rows, layer.columns, itemsize)

    def unfinished(self, block: int) -> list[Group]:
        """Groups of a block with a layer that is not written yet."""
        return [
            group
            for group in self.layer_groups[block]
            if not all(self._file(layer.name).exists() for layer in group.layers)
        ]

    @property
    def finished(self) -> list[int]:
        """Blocks whose layers are all written."""
        return [
            block
            for block in range(len(self.layer_groups))
            if not self.unfinished(block)
            and (block not in self.attentions or self._file(self.attentions[block]).exists())
        ]

    def write_layer(self, layer: str, packed: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Facts]) -> None:
        """Write a layer's tensors and facts, both by level."""
        tensors = {f"{level}.{part}": tensor for level, parts in packed.items() for part, tensor in parts.items()}
        self._file(layer).parent.mkdir(exist_ok=True)
        self.write_tensors(self._file(layer), tensors, {_FACTS: json.dumps(facts)})

    def facts(self, layer: str) -> dict[str, Facts]:
        """Rows of facts of a layer, by level."""
        if not self._levels:
            return {}
        with safe_open(self._file(layer), framework="pt") as file:
            facts: dict[str, Facts] = json.loads(file.metadata()[_FACTS])
        return facts

    def write_attention(self, attention: str, scales: Mapping[str, Tensor]) -> None:
        """Write the scales of an attention's keys and values."""
        self.write_layer(attention, {_ATTENTION: scales}, {})

    def attention_tensors(self, attention: str) -> dict[str, Tensor]:
        """Scales of an attention's keys and values."""
        return self.parts(attention, _ATTENTION)

    def read_attention(self, attention: str) -> dict[str, InputRounding]:
        """Roundings of an attention's keys, values and queries by their first letters; empty where there are none."""
        if self.attention is None:
            return {}
        scales = self.attention_tensors(attention)
        return {name[0]: self.attention.rounding(scales, name[0]) for name in self.attention.names}

    def unpack_attention(self, attention: str, packed: Mapping[str, Tensor]) -> dict[str, InputRounding]:
        """The same; packed is empty, since write_attention wrote the scales."""
        assert not packed
        return self.read_attention(attention)

    def inputs(self, layer: str, level: str) -> InputRounding | None:
        """How the inputs of a layer are rounded at a level; None where they are not."""
        scheme = self._groups[layer].level_of(parse_level(level)).inputs
        if scheme is None:
            return None
        return input_rounding(scheme, self._read(layer, level, INPUT_TENSORS), layer)

    def read_inputs(self, groups: Sequence[Group]) -> Iterator[tuple[str, InputRounding | None]]:
        """Path in the block and rounding of the inputs of each layer of some groups, at the propagated level."""
        assert self._propagated is not None
        for group in groups:
            for layer in group.layers:
                yield layer.module, self.inputs(layer.name, self._propagated.name)

    def unpack_inputs(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, InputRounding | None]]:
        """The same; packed is empty, since write_layer wrote the layers."""
        assert not packed
        return self.read_inputs(groups)

    def parts(self, layer: str, level: str) -> dict[str, Tensor]:
        """Stored tensors of a layer at a level; other levels are not read."""
        return self._read(layer, level)

    def _read(self, layer: str, level: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Stored tensors of a layer at a level, or those of them that are among `names`."""
        start = f"{level}."
        with safe_open(self._file(layer), framework="pt") as file:
            stored = [name.removeprefix(start) for name in file.keys() if name.startswith(start)]  # noqa: SIM118 (no mapping)
            return {name: file.get_tensor(start + name) for name in stored if names is None or name in names}

    def weight(self, layer: str, level: str) -> Tensor:
        """Weight (R, C) of a layer at a level, as a loader unpacks it."""
        parts = self.parts(layer, level)
        return parse_level(level).unpack({name: part for name, part in parts.items() if name not in INPUT_TENSORS})

    def checkpoint_tensors(self, layer: str, level: str) -> dict[str, Tensor]:
        """Tensors of a layer at a level in a checkpoint, by what follows the layer's name."""
        parts = self.parts(layer, level)
        inputs = {name: parts.pop(name) for name in INPUT_TENSORS if name in parts}
        return parse_level(level).checkpoint_tensors(parts) | inputs

    def read_layers(self, groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Path in the block of each layer of solved groups, and a function that reads it at the propagated level."""
        assert self._propagated is not None
        for group in groups:
            for layer in group.layers:
                yield layer.module, partial(self.weight, layer.name, self._propagated.name)

    def unpack_layers(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """The same; packed is empty, since write_layer wrote the layers."""
        assert not packed
        return self.read_layers(groups)

    def write_block(self, block: int, packed: Mapping[str, Mapping[str, Tensor]], facts: list[Facts]) -> None:
        """Check that the layers of a block are written; packed is empty, since write_layer wrote them."""
        assert not packed
        missing = self.unfinished(block)
        assert not missing, f"{missing[0].key} was not written"

    def finish(self) -> None:
        """Write the file that marks the database as complete."""
        content: dict[str, object] = {
            "checkpoint": self.checkpoint.fingerprint(),
            "levels": self.levels,
            "layers": [layer.name for groups in self.layer_groups for group in groups for layer in group.layers],
        }
        outer = outer_levels([group for groups in self.layer_groups for group in groups if group.role is not None])
        if outer:
            content["outer"] = outer.names()
        if self.attention is not None:
            content["attention"] = asdict(self.attention)
        if self._transformed is not None:
            content["transformed"] = list(self._transformed)
        self.write_json(self.path / self.last_file, content)

    def nbytes(self) -> int:
        """Bytes of all layer files on disk."""
        return sum(file.stat().st_size for file in (self.path / _LAYERS).glob("*.safetensors"))

    def _file(self, layer: str) -> Path:
        return self.path / _LAYERS / f"{layer}.safetensors"


def attention_names(architecture: Architecture) -> dict[int, str]:
    """Names of the attentions with a cache of keys and values, by block."""
    names = ((block, architecture.attention_name(block)) for block in range(architecture.num_blocks))
    return {block: name for block, name in names if name is not None}


def _parsed(names: Sequence[str]) -> tuple[Level, ...]:
    return tuple(parse_level(name) for name in names)
