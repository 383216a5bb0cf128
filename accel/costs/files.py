"""Bytes of the files that a run writes, to the byte for tensors and nearly so for what stands around them."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path

import torch

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.levels.level import Level
from hasten.accel.compression.outputs.checkpoint import COPIED, OWN, outer_shards
from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.models.architecture import Architecture, Layer

# Name, dtype as safetensors calls it, shape, bytes.
Tensors = list[tuple[str, str, tuple[int, ...], int]]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "U8")
# A row of facts, of a layer at a level, in JSON: in a file of its own with indents, and within a header.
_FACTS_BYTES, _LEVEL_FACTS_BYTES = 350, 340
# Digests of the modules that a run is made of, in its fingerprint.
_CODE_BYTES = 3400


def safetensors_bytes(tensors: Tensors, note: int = len('"format":"pt"')) -> int:
    """Bytes of a file with these tensors; note: of the entry in its metadata."""
    header, offset = len('{"__metadata__":{}') + note, 0
    # Offsets are longer the later they come: safetensors sorts by dtype, then by name.
    for name, dtype, shape, size in sorted(tensors, key=lambda each: (_ORDER.index(each[1]), each[0])):
        numbers = ",".join(map(str, shape))
        entry = f',"{name}":{{"dtype":"{dtype}","shape":[{numbers}],"data_offsets":[{offset},{offset + size}]}}'
        header, offset = header + len(entry), offset + size
    header += len("}")
    return 8 + ceil(header / 8) * 8 + offset


def grid_tensors(layer: Layer, scheme: Scheme, itemsize: int) -> Tensors:
    """What the format pack-quantized stores of a layer: dense codes in 32-bit words, scales, zero points, shape."""
    rows, columns = layer.rows, layer.columns
    groups = columns // scheme.columns(columns)
    words, dtype = ceil(columns * scheme.bits / 32), "BF16" if itemsize == 2 else "F32"
    found: Tensors = [
        (f"{layer.name}.weight_shape", "I64", (2,), 16),
        (f"{layer.name}.weight_packed", "I32", (rows, words), 4 * rows * words),
        (f"{layer.name}.weight_scale", dtype, (rows, groups), itemsize * rows * groups),
    ]
    if not scheme.symmetric:
        words = ceil(rows * scheme.bits / 32)
        found.append((f"{layer.name}.weight_zero_point", "I32", (words, groups), 4 * words * groups))
    return found


def level_tensors(layer: Layer, level: Level, itemsize: int) -> Tensors:
    """What a level database stores of a layer at a level."""
    rows, columns = layer.rows, layer.columns
    dtype = "BF16" if itemsize == 2 else "F32"
    shape: tuple[str, str, tuple[int, ...], int] = ("weight_shape", "I64", (2,), 16)
    if isinstance(level, Scheme):
        return grid_tensors(layer, level, itemsize)
    if isinstance(level, Sparsity):
        kept, mask = rows * (columns - level.pruned(columns)), ceil(columns / 8)
        return [shape, ("values", dtype, (kept,), itemsize * kept), ("mask", "U8", (rows, mask), rows * mask)]
    assert isinstance(level, ColumnBits)
    codes, widths = ceil(rows * level.total(columns) / 8), ceil(columns / 2)
    return [
        shape,
        ("scale", dtype, (rows,), itemsize * rows),
        ("widths", "U8", (widths,), widths),
        ("codes", "U8", (codes,), codes),
    ]


def checkpoint_files(architecture: Architecture, plan: Sequence[Sequence[Group]]) -> dict[str, int]:
    """Bytes of a compressed checkpoint: tensors of blocks, tensors outside them, and small files."""
    checkpoint = architecture.checkpoint
    outer = [_plain(architecture, names) for names in outer_shards(architecture)]
    small = _CODE_BYTES
    blocks = 0
    shards = len(outer) + architecture.num_blocks
    index = list(outer)
    for block, groups in enumerate(plan):
        tensors = [
            tensor
            for group in groups
            for layer in group.layers
            for tensor in grid_tensors(layer, group.scheme, checkpoint.dtype(f"{layer.name}.weight").itemsize)
        ]
        quantized = {f"{layer.name}.weight" for group in groups for layer in group.layers}
        tensors += _plain(architecture, [name for name in architecture.block_tensors(block) if name not in quantized])
        blocks += safetensors_bytes(tensors)
        index.append(tensors)
        small += _FACTS_BYTES * len(quantized)
    file = len(f"model-{shards:05d}-of-{shards:05d}.safetensors")
    small += sum(len(name) + file + len('    "": "",\n') for tensors in index for name, *_ in tensors)
    small += _config_bytes(architecture, plan) + copied_bytes(checkpoint.path)
    return {"blocks": blocks, "embedding and head": sum(map(safetensors_bytes, outer)), "small files": small}


def database_files(
    architecture: Architecture, plan: Sequence[Sequence[Group]], levels: Sequence[Level]
) -> dict[str, int]:
    """Bytes of a level database: a file a layer."""
    total = 0
    for groups in plan:
        for group in groups:
            for layer in group.layers:
                itemsize = architecture.checkpoint.dtype(f"{layer.name}.weight").itemsize
                tensors: Tensors = []
                for level in levels:
                    own = level
                    if isinstance(level, Scheme) and group.is_expert:
                        own = Scheme(level.bits, level.group_size, symmetric=True)
                    tensors += level_tensors(layer, own, itemsize)
                # Names in the file begin with the level and not with the layer, whose name is about as long.
                total += safetensors_bytes(tensors, _LEVEL_FACTS_BYTES * len(levels))
    return {"levels": total}


def copied_bytes(folder: Path) -> int:
    """Bytes of the tokenizer's and the like files of a checkpoint, which are copied."""
    found = {
        file
        for pattern in COPIED
        for file in folder.glob(pattern)
        if file.name not in OWN and not file.name.endswith(".index.json")
    }
    return sum(file.stat().st_size for file in found)


def _plain(architecture: Architecture, names: Iterable[str]) -> Tensors:
    checkpoint = architecture.checkpoint
    return [
        (name, _NAMES.get(checkpoint.dtype(name), "BF16"), checkpoint.shape(name), checkpoint.nbytes(name))
        for name in names
    ]


def _config_bytes(architecture: Architecture, plan: Sequence[Sequence[Group]]) -> int:
    """Bytes of config.json, with what is added on the quantization, and of what a run notes about itself."""
    known: Mapping[str, object] = architecture.checkpoint.config
    names = {layer.name for groups in plan for group in groups for layer in group.layers}
    untouched = sum(
        len(layer.name) + len('      "",\n')
        for block in range(architecture.num_blocks)
        for layer in architecture.linears(block)
        if layer.name not in names
    )
    return len(str(known)) + 1500 + untouched
