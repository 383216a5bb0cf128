"""The folder of a compressed checkpoint while it is being made: one shard a block, each written whole or not at all.

A shard is written under a temporary name, synced and renamed; next to it, in `.hasten`, stand the facts of its block.
Index and config.json come last: a folder without them is visibly unfinished, and the shards in it are what a later run
keeps.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from accel.compression.formats.base import Format
from accel.compression.plan import Group, schemes
from accel.compression.quantizers.base import QuantizedWeight
from accel.errors import UserError
from accel.models.architecture import Architecture

PROGRESS = ".hasten"
_FINGERPRINT = "fingerprint.json"
_SOURCE = "source.json"
# Tensors outside the blocks are gathered into shards of about this size.
_OUTER_BYTES = 1 << 27
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_OWN = ("config.json", "model.safetensors.index.json")


class OutputFolder:
    """A compressed checkpoint in the making; `plan` says which layers of which block are quantized."""

    def __init__(self, path: Path, architecture: Architecture, plan: list[list[Group]], form: Format) -> None:
        self.path = path
        self._architecture = architecture
        self._plan = plan
        self._format = form
        self._outer = list(_gather(architecture))
        self._shards = architecture.num_blocks + len(self._outer)

    def shard(self, block: int) -> Path:
        """File of a block."""
        return self.path / f"model-{len(self._outer) + block + 1:05d}-of-{self._shards:05d}.safetensors"

    def facts(self, block: int) -> list[dict[str, Any]]:
        """What was noted about each quantized layer of a finished block."""
        layers: list[dict[str, Any]] = json.loads(self._facts_file(block).read_text())
        return layers

    def is_finished(self, block: int) -> bool:
        """Whether the block's shard stands."""
        return self.shard(block).exists() and self._facts_file(block).exists()

    @property
    def is_complete(self) -> bool:
        """Whether the whole checkpoint stands."""
        return (self.path / "config.json").exists()

    @property
    def finished(self) -> list[int]:
        """Blocks whose shards stand."""
        return [block for block in range(self._architecture.num_blocks) if self.is_finished(block)]

    def check(self, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        """UserError where `open` would refuse the folder; writes nothing.

        It is refused where it holds something else, or was begun with other settings: the message says which differ.
        """
        here = self.path
        while not os.path.lexists(here) and here != here.parent:
            here = here.parent
        if here == self.path and not here.is_dir():
            raise UserError(f"output={self.path} is a file: give a folder that is new or empty")
        if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
            raise UserError(f"output={self.path} cannot be made: {here} is no folder that can be written to")
        if self._is_new():
            return
        kept = self.path / PROGRESS / _FINGERPRINT
        if not kept.exists():
            raise UserError(f"output={self.path} holds something else: give a folder that is new or empty")
        differing = _differences(json.loads(kept.read_text()), fingerprint)
        if differing and not overwrite:
            raise UserError(
                f"output={self.path} was begun with other settings ({'; '.join(differing)}): "
                f"run with those, give another output, or overwrite=true to start again"
            )

    def open(self, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, or go on in one that the same run left behind; UserError as in `check`."""
        self.check(fingerprint, overwrite)
        progress = self.path / PROGRESS
        if overwrite and not self._is_new():
            self._clear()
        _guard(PROGRESS, lambda: progress.mkdir(parents=True, exist_ok=True))
        for leftover in [*self.path.glob("*.tmp"), *progress.glob("*.tmp")]:
            leftover.unlink()
        if not (progress / _FINGERPRINT).exists():
            source = self._architecture.checkpoint.path.resolve()
            self._write_json(progress / _SOURCE, {"original": str(source)})
            self._write_json(progress / _FINGERPRINT, dict(fingerprint))

    def _is_new(self) -> bool:
        """Whether the folder is missing, empty, or as a run leaves it that was killed while it made the folder."""
        progress = self.path / PROGRESS
        begun = {progress, *(progress / name for name in (_SOURCE, "source.tmp", "fingerprint.tmp"))}
        return not self.path.exists() or all(path in begun for path in self.path.rglob("*"))

    def _clear(self) -> None:
        """Empty the folder of an earlier run.

        Killed half way, it is still known as a run's, by the fingerprint, and not taken for complete.
        """
        (self.path / _OWN[0]).unlink(missing_ok=True)
        kept = self.path / PROGRESS / _FINGERPRINT
        for path in [*self.path.iterdir(), *kept.parent.iterdir()]:
            if path.is_dir() and not path.is_symlink():
                if path != kept.parent:
                    shutil.rmtree(path)
            elif path != kept:
                path.unlink()
        kept.unlink()

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What write_block stores of a quantized weight."""
        return self._format.pack(weight)

    def write_block(self, block: int, packed: Mapping[str, Mapping[str, Tensor]], facts: list[dict[str, Any]]) -> None:
        """Write a block's shard: packed weights by layer name, everything else as the checkpoint has it."""
        tensors: dict[str, Tensor] = {}
        for name in self._architecture.block_tensors(block):
            layer = name.removesuffix(".weight")
            if layer in packed:
                tensors |= {f"{layer}.{part}": tensor for part, tensor in packed[layer].items()}
            else:
                tensors[name] = self._read(name)
        self._write_json(self._facts_file(block), facts)
        self._write_tensors(self.shard(block), tensors)

    def read_block(self, block: int) -> dict[str, Tensor]:
        """Weights that a loader makes of a finished block's quantized layers, by their path in the block."""
        from safetensors import safe_open

        weights: dict[str, Tensor] = {}
        with safe_open(self.shard(block), framework="pt") as file:
            stored = set(file.keys())
            for group in self._plan[block]:
                for layer in group.layers:
                    parts = {
                        part: file.get_tensor(f"{layer.name}.{part}")
                        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
                        if f"{layer.name}.{part}" in stored
                    }
                    weights[layer.module] = self._format.unpack(parts, group.scheme)
        return weights

    def finish(self) -> None:
        """Write what stands outside the blocks, copy the tokenizer and its like, then index and config.json."""
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(self._outer):
            path = self.path / f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
            if not path.exists():
                self._write_tensors(path, {name: self._read(name) for name in names})
            total += _index(path, weight_map)
        for block in range(self._architecture.num_blocks):
            total += _index(self.shard(block), weight_map)
        source = self._architecture.checkpoint.path
        for pattern in _COPIED:
            for file in sorted(source.glob(pattern)):
                if file.name not in _OWN and not file.name.endswith(".index.json"):
                    _guard(file.name, partial(shutil.copyfile, file, self.path / file.name))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json(self.path / _OWN[1], index)
        quantized = schemes(self._plan)
        untouched = [
            layer.name
            for block in range(self._architecture.num_blocks)
            for layer in self._architecture.linears(block)
            if layer.name not in quantized
        ]
        experts = any(group.is_expert for groups in self._plan for group in groups)
        config = dict(self._architecture.checkpoint.config)
        config["quantization_config"] = self._format.announce(quantized, ["lm_head", *untouched], experts)
        self._write_json(self.path / _OWN[0], config)

    def _facts_file(self, block: int) -> Path:
        return self.path / PROGRESS / f"block-{block:05d}.json"

    def _read(self, name: str) -> Tensor:
        tensor = self._architecture.checkpoint.tensor(name)
        self._architecture.checkpoint.check_finite(tensor, name)
        return tensor

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        _put(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}), needed)

    def _write_json(self, path: Path, content: Any) -> None:
        _put(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def original_of(checkpoint: Path) -> Path | None:
    """Checkpoint that a folder was compressed from, if that is noted in it and still there."""
    noted = checkpoint / PROGRESS / _SOURCE
    if not noted.is_file():
        return None
    original = Path(json.loads(noted.read_text())["original"])
    return original if original.is_dir() else None


def _put(path: Path, save: Callable[[Path], Any], needed: int = 0) -> None:
    """Write a file under another name and rename it; what a full disk could not hold does not stay on it."""
    temporary = path.with_suffix(".tmp")

    def write() -> None:
        save(temporary)
        _replace(temporary, path)

    try:
        _guard(path.name, write, needed)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file into place so that a power cut leaves the old state or the new one."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _guard(name: str, write: Callable[[], Any], needed: int = 0) -> None:
    """Run write(); a full disk becomes a UserError that says what to do."""
    try:
        write()
    except Exception as error:
        # safetensors reports the operating system's error inside its own.
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "os error 28" in str(error)
        if not full:
            raise
        wanted = f" ({needed / 2**20:.0f} MiB)" if needed else ""
        raise UserError(
            f"the disk is full while writing {name}{wanted}: make space and run the same command again; "
            f"finished blocks are kept"
        ) from None


def _gather(architecture: Architecture) -> Iterable[list[str]]:
    """Names outside the blocks, in lists of about one shard each."""
    names: list[str] = []
    size = 0
    for name in architecture.outer_tensors():
        bytes_ = architecture.checkpoint.nbytes(name)
        if names and size + bytes_ > _OUTER_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def _index(path: Path, weight_map: dict[str, str]) -> int:
    """Enter a shard's tensors into the weight map; returns their bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            weight_map[name] = path.name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old value, now new value` for every entry that differs."""
    return [
        f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
