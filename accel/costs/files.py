"""Bytes of the files that a run writes: exact for tensors, and close for headers and small files."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path

import torch

from hasten.accel.activations.scales import AttentionScheme, stored_inputs
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.outer import is_outer
from hasten.accel.compression.formats.base import StoredTensor
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.levels.database import attention_names
from hasten.accel.compression.outputs.checkpoint import outer_shards
from hasten.accel.compression.outputs.gguf import GgufFolder, GgufOptions
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.copied_files import copied_files

# (name, dtype by its safetensors name, shape, bytes) of every tensor.
Tensors = list[tuple[str, str, tuple[int, ...], int]]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3", "I8", "U8")
_FORMAT = CompressedTensors()
# Facts of a layer at a level, in JSON: in a file with indents, and in the header of a layer's file.
_FACTS_BYTES, _LEVEL_FACTS_BYTES = 380, 365
# Digests of a run's modules, in its fingerprint.
_CODE_BYTES = 8450


def safetensors_bytes(tensors: Tensors, note: int = len('"format":"pt"')) -> int:
    """Bytes of a safetensors file with these tensors. note: bytes of the entry in its metadata."""
    header, offset = len('{"__metadata__":{}') + note, 0
    # Later offsets have more digits, so the order matters: safetensors sorts by dtype, then by name.
    for name, dtype, shape, size in sorted(tensors, key=lambda tensor: (_ORDER.index(tensor[1]), tensor[0])):
        numbers = ",".join(map(str, shape))
        entry = f',"{name}":{{"dtype":"{dtype}","shape":[{numbers}],"data_offsets":[{offset},{offset + size}]}}'
        header, offset = header + len(entry), offset + size
    header += len("}")
    return 8 + ceil(header / 8) * 8 + offset


def checkpoint_tensors(layer: Layer, level: Level, itemsize: int) -> Tensors:
    """Tensors of a layer at a level in a checkpoint: codes on a grid, or the dense weight."""
    return _listed(layer, _in_checkpoint(level, layer.rows, layer.columns, itemsize))


# A mixture has thousands of layers of few shapes.
@lru_cache(maxsize=1024)
def _in_checkpoint(level: Level, rows: int, columns: int, itemsize: int) -> tuple[StoredTensor, ...]:
    scheme, dtype = level.loader_scheme, _dtype(itemsize)
    if scheme is None:
        return (StoredTensor("weight", dtype, (rows, columns)),)
    return (*_FORMAT.tensors(scheme, rows, columns, dtype), *_input_tensors(level, dtype))


def level_tensors(layer: Layer, level: Level, itemsize: int) -> Tensors:
    """Tensors of a layer at a level in a level database.

    Names begin here with the layer's name; in the file they begin with the level's, which is about as long.
    """
    return _listed(layer, _in_database(level, layer.rows, layer.columns, itemsize))


@lru_cache(maxsize=1024)
def _in_database(level: Level, rows: int, columns: int, itemsize: int) -> tuple[StoredTensor, ...]:
    dtype = _dtype(itemsize)
    return (*level.stored_tensors(rows, columns, dtype), *_input_tensors(level, dtype))


def _input_tensors(level: Level, dtype: torch.dtype) -> list[StoredTensor]:
    """Calibrated scales of a layer's inputs."""
    return [StoredTensor(name, own, (1,)) for name, own in stored_inputs(level.inputs, dtype).items()]


def _attention_tensors(architecture: Architecture, name: str, scheme: AttentionScheme) -> Tensors:
    """Scales of an attention of this name."""
    heads = int(architecture.config.num_attention_heads)
    shapes = scheme.shapes(heads, int(getattr(architecture.config, "num_key_value_heads", None) or heads))
    dtype = _dtype(architecture.checkpoint.dtype(architecture.block_tensors(0)[0]).itemsize)
    stored = [StoredTensor(part, dtype, shape) for part, shape in shapes.items()]
    return [(f"{name}.{tensor.name}", _NAMES[tensor.dtype], tensor.shape, tensor.nbytes) for tensor in stored]


def _listed(layer: Layer, tensors: Iterable[StoredTensor]) -> Tensors:
    return [(f"{layer.name}.{tensor.name}", _NAMES[tensor.dtype], tensor.shape, tensor.nbytes) for tensor in tensors]


def _dtype(itemsize: int) -> torch.dtype:
    return torch.bfloat16 if itemsize == 2 else torch.float32


def checkpoint_files(
    architecture: Architecture, layer_groups: Sequence[Sequence[Group]], attention: AttentionScheme | None = None
) -> dict[str, int]:
    """Bytes of a compressed checkpoint: tensors of blocks, tensors outside them, and small files.

    attention: how keys and values are rounded; None where they are not.
    """
    attentions = {} if attention is None else attention_names(architecture)
    checkpoint = architecture.checkpoint
    outer = [_plain(architecture, names) for names in outer_shards(architecture, layer_groups)]
    small = _CODE_BYTES
    blocks, packed = 0, 0
    shards = len(outer) + len(layer_groups)
    index = list(outer)
    for block, groups in enumerate(layer_groups):
        tensors = [
            tensor
            for group in groups
            for layer in group.layers
            for tensor in checkpoint_tensors(layer, group.level, checkpoint.dtype(f"{layer.name}.weight").itemsize)
        ]
        quantized = {f"{layer.name}.weight" for group in groups for layer in group.layers}
        if is_outer(groups):
            packed += safetensors_bytes(tensors)
        else:
            rest = [name for name in architecture.block_tensors(block) if name not in quantized]
            tensors += _plain(architecture, rest)
            if attention is not None and block in attentions:
                tensors += _attention_tensors(architecture, attentions[block], attention)
            blocks += safetensors_bytes(tensors)
        index.append(tensors)
        small += _FACTS_BYTES * len(quantized)
    file = len(f"model-{shards:05d}-of-{shards:05d}.safetensors")
    small += sum(len(name) + file + len('    "": "",\n') for tensors in index for name, *_ in tensors)
    small += _config_bytes(architecture, layer_groups) + copied_bytes(checkpoint.path)
    outside = sum(map(safetensors_bytes, outer)) + packed
    return {"blocks": blocks, "embedding and head": outside, "small files": small}


def gguf_files(
    architecture: Architecture, layer_groups: Sequence[Sequence[Group]], options: GgufOptions
) -> dict[str, int]:
    """Bytes of a GGUF file, and of the files of the blocks that it is assembled from."""
    folder = GgufFolder(Path("planned"), architecture, layer_groups, options)
    blocks, small = 0, _CODE_BYTES + copied_bytes(architecture.checkpoint.path)
    for groups in layer_groups:
        layers = [(layer, group.level) for group in groups for layer in group.layers]
        itemsizes = [architecture.checkpoint.dtype(f"{layer.name}.weight").itemsize for layer, _ in layers]
        tensors = [level_tensors(*pair, itemsize) for pair, itemsize in zip(layers, itemsizes, strict=True)]
        blocks += safetensors_bytes([tensor for part in tensors for tensor in part])
        small += _FACTS_BYTES * len(layers)
    return {"GGUF file": folder.nbytes, "blocks": blocks, "small files": small}


def database_files(
    architecture: Architecture,
    layer_groups: Sequence[Sequence[Group]],
    levels: Sequence[Level],
    attention: AttentionScheme | None = None,
) -> dict[str, int]:
    """Bytes of a level database: a file a layer, and one an attention whose keys and values are rounded."""
    total = 0
    if attention is not None:
        for name in attention_names(architecture).values():
            total += safetensors_bytes(_attention_tensors(architecture, name, attention), len('"facts":"{}"'))
    for groups in layer_groups:
        for group in groups:
            for layer in group.layers:
                itemsize = architecture.checkpoint.dtype(f"{layer.name}.weight").itemsize
                tensors: Tensors = []
                own = group.levels or [group.level_of(level) for level in levels]
                for level in own:
                    tensors += level_tensors(layer, level, itemsize)
                total += safetensors_bytes(tensors, _LEVEL_FACTS_BYTES * len(own))
    return {"levels": total}


def copied_bytes(folder: Path) -> int:
    """Bytes of the files of a checkpoint that are copied, such as the tokenizer's."""
    return sum(file.stat().st_size for file in copied_files(folder))


def _plain(architecture: Architecture, names: Iterable[str]) -> Tensors:
    checkpoint = architecture.checkpoint
    return [
        (name, _NAMES.get(checkpoint.dtype(name), "BF16"), checkpoint.shape(name), checkpoint.nbytes(name))
        for name in names
    ]


def _config_bytes(architecture: Architecture, layer_groups: Sequence[Sequence[Group]]) -> int:
    """Bytes of config.json with its quantization_config, and of the files in which a run records its settings."""
    known: Mapping[str, object] = architecture.checkpoint.config
    names = {layer.name for groups in layer_groups for group in groups for layer in group.layers}
    untouched = sum(
        len(layer.name) + len('      "",\n')
        for block in range(architecture.num_blocks)
        for layer in architecture.linears(block)
        if layer.name not in names
    )
    return len(str(known)) + 1500 + untouched
