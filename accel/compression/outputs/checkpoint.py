"""The output folder of a compressed checkpoint: one shard a block, each written atomically.

The folder `.hasten` in it holds the facts of the blocks. The index and config.json are written last: a folder without
them is visibly unfinished, and a resumed run keeps its shards.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor

from hasten.accel.activations.description import INPUT_TENSORS, described, input_rounding
from hasten.accel.activations.hadamard import described as described_rotation
from hasten.accel.activations.hadamard import groups_of, tensor_name
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration.layer_groups import Group, schemes
from hasten.accel.compression.formats.base import Format
from hasten.accel.compression.levels.depth import shorten
from hasten.accel.compression.result import Facts
from hasten.accel.models.architecture import HEAD, TIED, Architecture
from hasten.accel.models.copied_files import OWN, copied_files
from hasten.accel.models.tensor_names import BLOCK_NUMBER, below_holder
from hasten.accel.outputs.resumable import PROGRESS, ResumableFolder, guard

# Size of the shards with the tensors outside the blocks.
_OUTER_BYTES = 1 << 27
# Modules that contain the whole model; patterns name the modules below them.
_HOLDERS = {"model", "decoder", "language_model"}
# Tensors of a compressed layer that its weight is unpacked from; those that a scheme does not need are not stored.
_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)


class OutputFolder(ResumableFolder):
    """Output folder of a compressed checkpoint.

    layer_groups: layers that are compressed, by block, and behind the blocks the groups of calibration/outer.py. kept:
    ascending numbers of the blocks that are written; None for all. Methods take a block's number in the original; in
    the files it has its index among the kept blocks. attention: how keys and values are rounded; None where they are
    not. edits: folder inside for the edits of transforms, while they run.
    """

    edits: ClassVar[str] = f"{PROGRESS}/transforms"

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        layer_groups: list[list[Group]],
        form: Format,
        kept: Sequence[int] | None = None,
        attention: AttentionScheme | None = None,
    ) -> None:
        super().__init__(path, architecture.checkpoint.path)
        self._architecture = architecture
        self._layer_groups = layer_groups
        self.format, self.attention = form, attention
        self._kept = tuple(range(architecture.num_blocks)) if kept is None else tuple(kept)
        # Output layer and embedding, where they are compressed, are written as one more block.
        self._written = (*self._kept, *range(architecture.num_blocks, len(layer_groups)))
        self._places = {block: place for place, block in enumerate(self._written)}
        self._outer = list(outer_shards(architecture, layer_groups))
        # Rotations of inputs by block and layer, and the layers of each group of them.
        self._rotations = {block: architecture.input_rotations(block) for block in self._kept}
        self._online = groups_of({name: found for of in self._rotations.values() for name, found in of.items()})
        self._shards = len(self._written) + len(self._outer)

    def shard(self, block: int) -> Path:
        """File of a block."""
        number = len(self._outer) + self._places[block] + 1
        return self.path / f"model-{number:05d}-of-{self._shards:05d}.safetensors"

    def facts(self, block: int) -> list[Facts]:
        """Facts of each compressed layer of a finished block."""
        layers: list[Facts] = json.loads(self._facts_file(block).read_text())
        return layers

    def is_finished(self, block: int) -> bool:
        """Whether the block's shard is written."""
        return self.shard(block).exists() and self._facts_file(block).exists()

    def unfinished(self, block: int) -> list[Group]:
        """Groups of a block that are not solved yet: all of them until its shard is written."""
        return [] if self.is_finished(block) else list(self._layer_groups[block])

    @property
    def finished(self) -> list[int]:
        """Blocks whose shards are written."""
        return [block for block in self._written if self.is_finished(block)]

    def write_block(self, block: int, packed: Mapping[str, Mapping[str, Tensor]], facts: list[Facts]) -> None:
        """Write a block's shard: packed layers by name, and all other tensors of the block from the original.

        packed: tensors of a layer by what follows its name; a `bias` among them replaces the layer's bias.
        """
        tensors = {f"{layer}.{part}": tensor for layer, parts in packed.items() for part, tensor in parts.items()}
        for group, layers in self._online.items():
            # The matrix that all layers of the group share, once.
            if layers[0] in self._rotations.get(block, {}):
                tensors[f"{layers[0]}.{tensor_name(group)}"] = self._rotations[block][layers[0]].matrix()
        for name in self._architecture.block_tensors(block) if block < self._architecture.num_blocks else ():
            if name.removesuffix(".weight") not in packed and name not in tensors:
                tensors[name] = self._read(name)
        self.write_json(self._facts_file(block), facts)
        self.write_tensors(self.shard(block), {self._renamed(name): tensor for name, tensor in tensors.items()})

    def read_layers(self, groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Path in the block of each layer of some groups of a finished block, and a function that reads it.

        Weights are those that a loader unpacks.
        """
        for group in groups:
            for layer in group.layers:
                yield layer.module, partial(self._stored_weight, group, layer.name)

    def _stored_weight(self, group: Group, layer: str) -> Tensor:
        return self._unpacked(group, layer, self._stored(group.block, [layer], _PARTS))

    def read_inputs(self, groups: Sequence[Group]) -> Iterator[tuple[str, InputRounding | None]]:
        """Path in the block and rounding of the inputs of each layer of some groups of a finished block."""
        names = [layer.name for group in groups for layer in group.layers]
        stored = self._stored(groups[0].block, names, INPUT_TENSORS) if names else {}
        return self.unpack_inputs(groups, stored)

    def unpack_inputs(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, InputRounding | None]]:
        """Path in the block and rounding of the inputs of each layer of some groups. packed: see write_block."""
        for group in groups:
            scheme = group.level.inputs
            for layer in group.layers:
                rounding = None if scheme is None else input_rounding(scheme, packed[layer.name], layer.name)
                yield layer.module, rounding

    def read_attention(self, attention: str) -> dict[str, InputRounding]:
        """Roundings of an attention's keys, values and queries in a finished block; empty where there are none."""
        if self.attention is None:
            return {}
        block = next(block for block in self._kept if self._architecture.attention_name(block) == attention)
        return self.unpack_attention(attention, self._stored(block, [attention], self.attention.names)[attention])

    def unpack_attention(self, attention: str, packed: Mapping[str, Tensor]) -> dict[str, InputRounding]:
        """Roundings of an attention's keys `k`, values `v` and queries `q` by its tensors."""
        assert self.attention is not None
        return {name[0]: self.attention.rounding(packed, name[0]) for name in self.attention.names}

    def _stored(self, block: int, names: Iterable[str], parts: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """The tensors of modules in a block's shard, of those among `parts` that there are, by module and part."""
        with safe_open(self.shard(block), framework="pt") as file:
            stored = set(file.keys())
            return {
                name: {
                    part: file.get_tensor(f"{self._renamed(name)}.{part}")
                    for part in parts
                    if f"{self._renamed(name)}.{part}" in stored
                }
                for name in names
            }

    def unpack_layers(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Path in the block of each layer of some groups, and a function that unpacks it. packed: see write_block."""
        for group in groups:
            for layer in group.layers:
                yield layer.module, partial(self._unpacked, group, layer.name, packed)

    def _unpacked(self, group: Group, layer: str, packed: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        scheme = group.level.loader_scheme
        parts = {name: part for name, part in packed[layer].items() if name not in INPUT_TENSORS}
        return parts["weight"] if scheme is None else self.format.unpack(parts, scheme)

    def finish(self) -> None:
        """Write the tensors outside the blocks, copy the tokenizer's and similar files, then write index and config."""
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(self._outer):
            path = self.path / f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
            if not path.exists():
                self.write_tensors(path, {name: self._read(name) for name in names})
            total += _index(path, weight_map)
        for block in self._written:
            total += _index(self.shard(block), weight_map)
        source = self._architecture.checkpoint.path
        for file in copied_files(source):
            guard(file.name, partial(shutil.copyfile, file, self.path / file.name))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_json(self.path / OWN[1], index)
        self.write_json(self.path / OWN[0], self._config())

    def _config(self) -> dict[str, Any]:
        """Content of config.json."""
        config = shorten(self._architecture, self._kept)
        quantized = schemes(self._layer_groups)
        if not quantized and self.attention is None and not self._online:
            return config
        untouched = [
            pattern
            for block in self._kept
            for name, path in self._linears(block)
            if name not in quantized
            for pattern in self._as_module(block, name, path)
        ]
        experts = any(group.is_expert for groups in self._layer_groups for group in groups)
        renamed = {self._renamed(name): scheme for name, scheme in quantized.items()}
        # transformers knows layers by the paths of its modules; its experts are no modules.
        for group in (group for groups in self._layer_groups for group in groups if group.role is None):
            for layer in group.layers if not group.is_expert else ():
                if layer.name in quantized:
                    renamed.setdefault(self._module(group.block, layer.module), quantized[layer.name])
        roles = {group.role: group.key for groups in self._layer_groups for group in groups if group.role is not None}
        if TIED in roles:
            # Loaders build an output layer, which then takes the embedding's tensors.
            renamed[self._architecture.adapter.head] = quantized[roles[TIED]]
        head = [] if {HEAD, TIED} & roles.keys() else [self._architecture.adapter.head]
        announced = self.format.announce(renamed, [*head, *untouched, *self._outer_linears()], experts)
        if self._online:
            announced["transform_config"] = self._transforms()
        if not self._architecture.adapter.loads_packed and len(set(quantized.values())) == 1:
            # transformers reads all layers on the grid of the first config group where it unpacks them.
            announced["dequantize"] = True
        if self.attention is not None:
            self._announce_attention(announced, self.attention)
        return config | {"quantization_config": announced}

    def _transforms(self) -> dict[str, Any]:
        """compressed-tensors' transform_config: inputs of layers that are rotated while the model runs."""
        rotations = {name: found for of_block in self._rotations.values() for name, found in of_block.items()}
        ignored = self._outer_linears()
        return {
            "config_groups": {
                group: described_rotation(rotations[layers[0]].size, self._patterns(layers), ignored)
                for group, layers in self._online.items()
            }
        }

    def _patterns(self, layers: Sequence[str]) -> list[str]:
        """Regular expressions for layers, as servers and transformers name them, one for like layers of all blocks."""
        linears = ((block, layer) for block in self._kept for layer in self._architecture.linears(block))
        modules = {layer.name: self._module(block, layer.module) for block, layer in linears}
        alike: dict[str, list[str]] = {}
        for layer in layers:
            for name in dict.fromkeys(map(below_holder, (self._renamed(layer), modules[layer]))):
                of_all = r"\d+".join(map(re.escape, BLOCK_NUMBER.split(name, 1)))
                alike.setdefault(of_all, []).append(re.escape(name))
        ends = [
            end for of_all, names in alike.items() for end in ([of_all] if len(names) == len(self._kept) else names)
        ]
        return [rf"re:(.*\.)?{end}$" for end in ends]

    def _announce_attention(self, announced: dict[str, Any], scheme: AttentionScheme) -> None:
        """Add the cache's scheme to a quantization_config, and a group for the attentions where queries are rounded."""
        arguments = described(scheme.states)
        announced["kv_cache_scheme"] = arguments
        if scheme.queries:
            # vLLM ignores groups of classes whose names have `Attention`, and takes their scales from the tensors.
            announced["config_groups"]["attention"] = {
                "targets": self._architecture.attention_classes(),
                "weights": None,
                "input_activations": arguments,
                "output_activations": None,
                "format": None,
            }

    def _linears(self, block: int) -> list[tuple[str, str]]:
        """Name in the checkpoint, and path in the block, of all linear layers of a block, called or not."""
        layers = [(layer.name, layer.module) for layer in self._architecture.linears(block)]
        return layers + [(name, path) for name, (path, _) in self._architecture.skipped(block).items()]

    def _module(self, block: int, path: str) -> str:
        """Path of a layer's module in the model. path: in its block."""
        return f"{self._architecture.adapter.blocks}.{self._places[block]}.{path}"

    def _as_module(self, block: int, name: str, path: str) -> list[str]:
        """A block's layer as loaders find it. Servers know its name in the checkpoint, transformers its module's path.

        A pattern stands for names whose prefix differs.
        """
        stored, module = self._renamed(name), self._module(block, path)
        if stored == module:
            return [stored]
        ends = dict.fromkeys([below_holder(stored), below_holder(module)])
        return [rf"re:(.*\.)?{re.escape(end)}$" for end in ends]

    def _outer_linears(self) -> list[str]:
        """Patterns of modules outside the blocks that may hold linear layers: OPT-350m's projections, vision towers."""
        shape, adapter = self._architecture.checkpoint.shape, self._architecture.adapter
        names = [
            name for name in self._architecture.outer_tensors() if name.endswith(".weight") and "embed" not in name
        ]
        start = self._architecture.block_start(0)
        holders = {*_HOLDERS, *start.split(".")[:-3], *adapter.blocks.split(".")[:-1]}
        # As in the checkpoint, and as in transformers' model.
        paths = [name.removesuffix(".weight") for name in names if len(shape(name)) == 2]
        paths += self._architecture.outer_linears()
        parts = [next((part for part in path.split(".") if part not in holders), "") for path in paths]
        head = adapter.head.rpartition(".")[2]
        return [rf"re:(.*\.)?{part}(\..*)?$" for part in dict.fromkeys(parts) if part and part != head]

    def _renamed(self, name: str) -> str:
        """Name in the files of a tensor or layer of a kept block, with the block's new number."""
        return BLOCK_NUMBER.sub(lambda number: str(self._places[int(number[0])]), name, count=1)

    def _facts_file(self, block: int) -> Path:
        return self.path / PROGRESS / f"block-{block:05d}.json"

    def _read(self, name: str) -> Tensor:
        tensor = self._architecture.checkpoint.tensor(name)
        self._architecture.checkpoint.check_finite(tensor, name)
        return tensor


def outer_shards(architecture: Architecture, layer_groups: Sequence[Sequence[Group]]) -> Iterable[list[str]]:
    """Names of the tensors outside the blocks that are not compressed, in one list a shard."""
    packed = {f"{group.key}.weight" for groups in layer_groups for group in groups if group.role is not None}
    names: list[str] = []
    size = 0
    for name in architecture.outer_tensors():
        if name in packed:
            continue
        bytes_ = architecture.checkpoint.nbytes(name)
        if names and size + bytes_ > _OUTER_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def _index(path: Path, weight_map: dict[str, str]) -> int:
    """Add a shard's tensors to the weight map; returns their bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            weight_map[name] = path.name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total
