"""The output folder of a checkpoint as a GGUF file for llama.cpp: `model.gguf`, beside config and tokenizer.

The folder `.hasten` in it holds the compressed blocks, a safetensors file each. When all are finished, the GGUF file is
assembled from them and from the original, tensor by tensor, and written atomically. Matrices outside the blocks are
rounded while it is written. Files of the blocks stay; their bytes are those of the result.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hasten.accel.activations.rounding import InputRounding
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.levels.depth import shorten
from hasten.accel.compression.quantizers.block_grid import find_block_grid, round_to_blocks
from hasten.accel.compression.result import Facts
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.copied_files import OWN, copied_files
from hasten.accel.models.ggml.base import BlockType
from hasten.accel.models.ggml.types import TYPES, type_for
from hasten.accel.models.gguf.families import expert_of, family_of
from hasten.accel.models.gguf.metadata import add_metadata, check_config, rope_factors
from hasten.accel.models.gguf.place import BF16, F16, F32, to_pairs
from hasten.accel.models.gguf.tokenizer import add_tokenizer, splitter_of
from hasten.accel.models.gguf.writer import OutputTensor, write_gguf
from hasten.accel.outputs.resumable import PROGRESS, ResumableFolder, guard, write_whole

FILE = "model.gguf"
_PLAIN = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
_NAMED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Weights of a matrix outside the blocks that are rounded at a time.
_AT_ONCE = 1 << 22
_ROUTERS = "ffn_gate_inp"


@dataclass(frozen=True)
class GgufOptions:
    """What a GGUF file's matrices outside the blocks are, and how its tokenizer splits text.

    output_type, embedding_type: types of output layer and embedding; where one tensor serves as both it has the first.
    pre_tokenizer: llama.cpp's name; None finds it in the tokenizer's description.
    """

    output_type: str = "q6_k"
    embedding_type: str = "q6_k"
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("output_type", "embedding_type"):
            if getattr(self, name) not in (*TYPES, *_NAMED):
                raise UserError(
                    f"gguf.{name}={getattr(self, name)} is no type: expected one of {', '.join((*TYPES, *_NAMED))}"
                )


class GgufFolder(ResumableFolder):
    """Output folder of a GGUF file; see OutputFolder, whose methods it has.

    UserError where llama.cpp has no such architecture or a layer's level is none of its types.
    """

    last_file = FILE

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        layer_groups: Sequence[Sequence[Group]],
        options: GgufOptions,
        kept: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, architecture.checkpoint.path)
        self._architecture, self._layer_groups, self._options = architecture, layer_groups, options
        self._kept = tuple(range(architecture.num_blocks)) if kept is None else tuple(kept)
        rotated = next((name for block in self._kept for name in architecture.input_rotations(block)), None)
        if rotated is not None:
            raise UserError(
                f"format=gguf: inputs of {rotated} are rotated while the model runs, which llama.cpp does not: give "
                "online=false to the transform, or format=compressed_tensors"
            )
        self._family = family_of(architecture.checkpoint.config.get("model_type"))
        check_config(architecture.config, self._family)
        self._splitter = options.pre_tokenizer or splitter_of(architecture.checkpoint.path)
        self._types = {
            layer.name: _type_of(group, layer.name)
            for groups in layer_groups
            for group in groups
            for layer in group.layers
        }
        self._plan = self._planned()

    def facts(self, block: int) -> list[Facts]:
        """Facts of each compressed layer of a finished block."""
        layers: list[Facts] = json.loads(self._facts_file(block).read_text())
        return layers

    def is_finished(self, block: int) -> bool:
        """Whether the block's layers are written."""
        return self._block_file(block).exists() and self._facts_file(block).exists()

    def unfinished(self, block: int) -> list[Group]:
        """Groups of a block that are not solved yet: all of them until its layers are written."""
        return [] if self.is_finished(block) else list(self._layer_groups[block])

    @property
    def finished(self) -> list[int]:
        """Blocks whose layers are written."""
        return [block for block in self._kept if self.is_finished(block)]

    def write_block(self, block: int, packed: Mapping[str, Mapping[str, Tensor]], facts: list[Facts]) -> None:
        """Write a block's compressed layers. packed: stored tensors of their levels, by layer."""
        tensors = {f"{layer}.{part}": tensor for layer, parts in packed.items() for part, tensor in parts.items()}
        self.write_json(self._facts_file(block), facts)
        self.write_tensors(self._block_file(block), tensors)

    def read_layers(self, groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Path in the block and function for the weight of each layer of some groups of a finished block."""
        for group in groups:
            for layer in group.layers:
                yield layer.module, partial(self._stored_weight, group, layer.name)

    def _stored_weight(self, group: Group, layer: str) -> Tensor:
        start = f"{layer}."
        with safe_open(self._block_file(group.block), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118 (not a mapping)
            parts = {name[len(start) :]: file.get_tensor(name) for name in names}
        return group.level.unpack(parts)

    def unpack_layers(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Path in the block of each layer of some groups, and a function that unpacks it. packed: see write_block."""
        for group in groups:
            for layer in group.layers:
                yield layer.module, partial(_unpacked, group, layer.name, packed)

    def read_inputs(self, groups: Sequence[Group]) -> Iterator[tuple[str, None]]:
        """Path in the block of each layer of some groups: llama.cpp chooses how inputs are rounded, not the file."""
        return self.unpack_inputs(groups, {})

    def unpack_inputs(
        self, groups: Sequence[Group], packed: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, None]]:
        """See read_inputs."""
        return ((layer.module, None) for group in groups for layer in group.layers)

    def read_attention(self, attention: str) -> dict[str, InputRounding]:
        """Roundings of an attention's keys, values and queries: a GGUF file has none."""
        return {}

    def unpack_attention(self, attention: str, packed: Mapping[str, Tensor]) -> dict[str, InputRounding]:
        """See read_attention."""
        return {}

    def finish(self) -> None:
        """Copy the tokenizer's and similar files, write the config, then the GGUF file."""
        source = self._architecture.checkpoint.path
        for file in copied_files(source):
            guard(file.name, partial(shutil.copyfile, file, self.path / file.name))
        self.write_json(self.path / OWN[0], shorten(self._architecture, self._kept))
        config, rows = (
            self._architecture.config,
            self._architecture.checkpoint.shape(self._architecture.embedding_name())[0],
        )
        describe = [
            lambda writer: add_metadata(writer, config, self._family, Path(self.source_name).name, len(self._kept)),
            lambda writer: add_tokenizer(writer, source, rows, self._splitter),
        ]
        write = partial(write_gguf, architecture=self._family.name, describe=describe, tensors=self._plan)
        write_whole(self.path / FILE, write, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of the file."""
        return sum(tensor.nbytes for tensor in self._plan)

    def type_bytes(self) -> dict[str, int]:
        """Bytes of the tensors of every type, by the type's name."""
        from gguf import GGMLQuantizationType

        sizes: dict[str, int] = {}
        for tensor in self._plan:
            name = GGMLQuantizationType(tensor.kind).name.lower()
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
        return dict(sorted(sizes.items()))

    def _planned(self) -> list[OutputTensor]:
        """All tensors of the file in its order."""
        architecture = self._architecture
        tensors = [self._outer(name) for name in architecture.outer_tensors()]
        factors = rope_factors(architecture.config)
        if factors is not None:
            tensors.append(OutputTensor("rope_freqs.weight", factors.shape, F32, lambda: iter([factors.tobytes()])))
        for place, block in enumerate(self._kept):
            stacks: dict[str, list[str]] = {}
            for name in architecture.block_tensors(block):
                stacks.setdefault(self._name(name, block, place), []).append(name)
            tensors += [self._stacked(stored, block, names) for stored, names in stacks.items()]
        return tensors

    def _name(self, name: str, block: int, place: int) -> str:
        stored = self._family.stored_name(name, self._architecture.num_blocks)
        if stored is None:
            raise UserError(
                f"format=gguf cannot write tensor {name}: llama.cpp has none like it in {self._family.name}"
            )
        return stored.replace(f"blk.{block}.", f"blk.{place}.", 1)

    def _stacked(self, stored: str, block: int, names: Sequence[str]) -> OutputTensor:
        """A tensor of a block; several names are those of experts, whose matrices are stacked."""
        names = sorted(names, key=lambda name: expert_of(name) or 0)
        kinds = {self._kind(stored, name) for name in names}
        if len(kinds) > 1:
            raise UserError(
                f"experts of block {block} got several types: llama.cpp reads one for all experts of a block"
            )
        shape = self._architecture.checkpoint.shape(names[0])
        pieces = partial(self._pieces, block, names, kind := kinds.pop())
        return OutputTensor(stored, (len(names), *shape) if expert_of(names[0]) is not None else shape, kind, pieces)

    def _kind(self, stored: str, name: str) -> int:
        kind = self._types.get(name.removesuffix(".weight"))
        if kind is not None and name.endswith(".weight"):
            return kind.number
        checkpoint = self._architecture.checkpoint
        if len(checkpoint.shape(name)) < 2 or _ROUTERS in stored:
            # llama.cpp computes with these in float32 only.
            return F32
        return _PLAIN[checkpoint.dtype(name)]

    def _pieces(self, block: int, names: Sequence[str], kind: int) -> Iterator[bytes]:
        for name in names:
            layer = name.removesuffix(".weight")
            if layer in self._types and name.endswith(".weight"):
                with safe_open(self._block_file(block), framework="pt") as file:
                    values = file.get_tensor(f"{layer}.blocks")
            else:
                values = self._plain(name, kind)
            heads = self._family.heads(name, self._architecture.checkpoint.config)
            yield _bytes(to_pairs(values, heads) if heads else values)

    def _plain(self, name: str, kind: int) -> Tensor:
        checkpoint, offset = self._architecture.checkpoint, self._family.offset(name)
        tensor = checkpoint.tensor(name)
        checkpoint.check_finite(tensor, name)
        dtype = next(dtype for dtype, number in _PLAIN.items() if number == kind)
        return (tensor.float() + offset if offset else tensor).to(dtype)

    def _outer(self, name: str) -> OutputTensor:
        """A tensor outside the blocks."""
        architecture = self._architecture
        stored, shape = self._name(name, -1, -1), architecture.checkpoint.shape(name)
        if len(shape) < 2:
            return OutputTensor(stored, shape, F32, lambda: iter([_bytes(self._plain(name, F32))]))
        options = self._options
        chosen = options.output_type if name == architecture.head_name() else options.embedding_type
        if chosen in _NAMED:
            dtype = _NAMED[chosen]
            return OutputTensor(stored, shape, _PLAIN[dtype], lambda: self._rows(name, lambda rows: rows.to(dtype)))
        kind = type_for(TYPES[chosen], shape[1])
        if kind is None:
            raise UserError(f"gguf type {chosen} needs a multiple of 32 columns, {name} has {shape[1]}: use f16")
        return OutputTensor(stored, shape, kind.number, lambda: self._rows(name, partial(_rounded, kind)))

    def _rows(self, name: str, convert: Callable[[Tensor], Tensor]) -> Iterator[bytes]:
        checkpoint = self._architecture.checkpoint
        rows, columns = checkpoint.shape(name)
        step = max(1, _AT_ONCE // columns)
        for first in range(0, rows, step):
            values = checkpoint.row_range(name, first, min(rows, first + step))
            checkpoint.check_finite(values, name)
            yield _bytes(convert(values))

    def _facts_file(self, block: int) -> Path:
        return self.path / PROGRESS / f"block-{block:05d}.json"

    def _block_file(self, block: int) -> Path:
        return self.path / PROGRESS / f"block-{block:05d}.safetensors"


def options_of(options: GgufOptions) -> dict[str, Any]:
    """The options as plain values, for the fingerprint of a run."""
    return asdict(options)


def _type_of(group: Group, layer: str) -> type[BlockType]:
    kind = group.level.ggml_type(group.columns)
    if kind is None:
        raise UserError(
            f"format=gguf cannot store {layer} at level {group.level.name}: expected one of {', '.join(TYPES)}"
        )
    return kind


def _rounded(kind: type[BlockType], rows: Tensor) -> Tensor:
    grid = find_block_grid(rows, kind)
    return kind.encode(round_to_blocks(rows, kind, grid), grid)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _unpacked(group: Group, layer: str, packed: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    return group.level.unpack(packed[layer])
