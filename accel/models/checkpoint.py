"""A checkpoint folder, whose tensors are read by name, one at a time, and never memory-mapped."""

import hashlib
import json
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.accel.compression.activations.description import INPUT_TENSORS, input_rounding
from hasten.accel.compression.activations.rounding import InputRounding
from hasten.accel.errors import UserError
from hasten.accel.models.families import FAMILIES
from hasten.accel.models.packed import COUNTED, GROUP_INDEX, PACKED, PARTS, Packing
from hasten.accel.models.shards import Stored, read_header
from hasten.kernels.packed_weight import PackedWeight

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDED = "embedded:"
# Types of weights.
_READ = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIP_BYTES = 4096
# Bytes of a matrix that are checked for values that are not finite at a time.
_CHECKED_BYTES = 16 << 20
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# Terms of use, which a checkpoint that is made from the model must carry on.
_HUB_FILES += [
    f"*{word}*"
    for name in ("licence", "license", "notice", "copying", "copyright", "use_policy")
    for word in (name, name.capitalize(), name.upper())
]
_HUB_DUPLICATES = ["consolidated*", "original/*", "*.gguf"]


def resolve(model: str, weights: bool = True) -> Path:
    """Local folder of a model: `embedded:target`, a folder, or a name on the hub, which is downloaded.

    weights: whether to download the weights, too. UserError where there is no such model.
    """
    if model.startswith(_EMBEDDED):
        from hasten.accel.models import embedded

        name = model.removeprefix(_EMBEDDED)
        if name not in embedded.NAMES:
            choices = ", ".join(_EMBEDDED + choice for choice in embedded.NAMES)
            raise UserError(f"model={model!r} is not embedded: embedded are {choices}")
        return embedded.path(name)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise UserError(f"model={model!r} is a file: give the folder of a checkpoint")
    right = "give a checkpoint folder, a hub name such as org/name, or embedded:target"
    # A name whose first part is a local folder was meant as a path.
    if model.count("/") != 1 or model[0] in "./~" or model.endswith("/") or path.parent.is_dir():
        raise UserError(f"model={model!r} does not exist: {right}")
    return _download(model, right, weights)


def _download(name: str, right: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    ignored = _HUB_DUPLICATES if weights else [*_HUB_DUPLICATES, "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=ignored))
    # The hub's client raises its own, httpx's and the operating system's errors, without a common base.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model={name!r} is not a local folder and not on the hub ({reason}): {right}") from None


class Checkpoint:
    """Tensors of a transformers checkpoint in safetensors, by their logical names (see models.families).

    Making one reads only config.json, the index and the headers; UserError names the file or the tensor where they do
    not fit together. Fused experts appear as separate tensors, and a weight packed by compressed-tensors appears as the
    unpacked weight.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"checkpoint {self.path} does not exist: give the folder of a transformers checkpoint")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._headers: list[tuple[str, bytes]] = []
        self._stored: dict[str, Stored] = {}
        for file, names in _shards(self.path).items():
            raw, places = read_header(self.path / file)
            self._headers.append((file, raw))
            absent = [name for name in names if name not in places]
            if absent:
                raise UserError(f"tensor {absent[0]} is not in {self.path / file}, where the index puts it")
            self._stored |= places
        quantization = self.config.get("quantization_config") or self.config.get("compression_config")
        self._packing = Packing(quantization, str(self.path / "config.json")) if quantization else None
        self._plain, self._packed = self._entries()
        self._check_dtypes()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def _entries(self) -> tuple[dict[str, Stored], dict[str, dict[str, Stored]]]:
        """Places of plain tensors, and of the stored parts of packed weights, by logical name."""
        family = FAMILIES.get(str(self.config.get("model_type")))
        plain: dict[str, Stored] = {}
        packed: dict[str, dict[str, Stored]] = {}
        for stored_name, stored in self._stored.items():
            name = family.canonical(stored_name) if family else stored_name
            module, _, leaf = name.rpartition(".")
            if self._packing and leaf in PARTS and self._parent(stored_name) + PACKED in self._stored:
                packed.setdefault(f"{module}.weight", {})[leaf] = stored
                continue
            split = family.fused(name) if family and len(stored.shape) == 3 else None
            if split is None:
                plain[name] = stored
                continue
            experts, rows, _ = stored.shape
            for expert in range(experts):
                for part, first, last in split:
                    plain[part.format(expert)] = stored.part(expert, first * rows // 2, last * rows // 2)
        for name, parts in packed.items():
            lacking = [part for part in (PACKED, "weight_scale", "weight_shape") if part not in parts]
            if lacking:
                raise UserError(f"tensor {name.removesuffix('weight')}{lacking[0]} is missing from {self.path}")
        return plain, packed

    def _check_dtypes(self) -> None:
        """UserError where a weight or bias is stored in a type that no job reads; buffers may have any type."""
        for name, stored in self._plain.items():
            module, _, leaf = name.rpartition(".")
            # Some models have a buffer called bias, a mask, in a module without a weight.
            is_parameter = leaf == "weight" or (leaf == "bias" and f"{module}.weight" in self)
            if is_parameter and stored.dtype not in _READ:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _READ)
                raise UserError(
                    f"tensor {name} in {stored.file} is stored as {str(stored.dtype).removeprefix('torch.')}: weights "
                    f"must be {known}; convert the checkpoint first"
                )

    @staticmethod
    def _parent(name: str) -> str:
        return name[: name.rfind(".") + 1]

    @property
    def names(self) -> list[str]:
        """Logical names, sorted."""
        return sorted([*self._plain, *self._packed])

    def __contains__(self, name: str) -> bool:
        return name in self._plain or name in self._packed

    @property
    def is_compressed(self) -> bool:
        """Whether some weights are packed."""
        return bool(self._packed)

    @property
    def rounds_inputs(self) -> bool:
        """Whether servers round inputs of some layers, or keys and values, by the checkpoint's config."""
        return self._packing is not None and self._packing.rounds_inputs

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a packed weight, the unpacked shape."""
        if name not in self._packed:
            return self._place(name).shape
        if name not in self._shapes:
            self._shapes[name] = tuple(self._packed[name]["weight_shape"].read().tolist())
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype; of a packed weight, the dtype of its scales, in which it is unpacked."""
        return self._packed[name]["weight_scale"].dtype if name in self._packed else self._place(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor that `tensor` returns without a dtype."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk; of a packed weight, codes, scales and zero points together."""
        if name in self._packed:
            return sum(part.nbytes for leaf, part in self._packed[name].items() if leaf in COUNTED)
        return self._place(name).nbytes

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is a packed weight."""
        return name in self._packed

    def quantization(self, name: str) -> "QuantizationArgs | None":
        """compressed-tensors' QuantizationArgs of a packed weight; None for a plain tensor."""
        if name not in self._packed:
            return None
        assert self._packing is not None
        scheme = self._packing.scheme(name.removesuffix(".weight"))
        return None if scheme is None else scheme.weights

    def inputs(self, layer: str) -> InputRounding | None:
        """How servers round the inputs of a layer; None where they do not."""
        scheme = None if self._packing is None else self._packing.inputs(layer)
        if scheme is None:
            return None
        stored = {name: f"{layer}.{name}" for name in INPUT_TENSORS if f"{layer}.{name}" in self}
        return input_rounding(scheme, {name: self.tensor(full) for name, full in stored.items()}, layer)

    def attention(self, name: str, classes: Collection[str]) -> dict[str, InputRounding]:
        """How servers round keys `k`, values `v` and queries `q` of an attention; empty where they do not.

        name: of the attention's module. classes: names of its class and base classes.
        """
        scheme = None if self._packing is None else self._packing.attention(classes)
        if scheme is None:
            return {}
        missing = [part for part in scheme.names if f"{name}.{part}" not in self]
        if missing:
            raise UserError(f"tensor {name}.{missing[0]} is missing from {self.path}: the config has an FP8 KV cache")
        scales = {part: self.tensor(f"{name}.{part}") for part in scheme.names}
        return {part[0]: scheme.rounding(scales, part[0]) for part in scheme.names}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A private copy of a tensor; dtype None is the stored dtype."""
        if name in self._packed:
            assert self._packing is not None
            parts = {leaf: part.read() for leaf, part in self._packed[name].items()}
            tensor = self._packing.unpack(name.removesuffix(".weight"), parts)
        else:
            tensor = self._place(name).read()
        return tensor if dtype is None else tensor.to(dtype)

    def packed(self, name: str) -> PackedWeight:
        """A packed weight as it is stored, in new memory."""
        assert self._packing is not None
        module = name.removesuffix(".weight")
        parts = {leaf: part.read() for leaf, part in self._packed[name].items()}
        if f"{module}.{GROUP_INDEX}" in self._plain:
            parts[GROUP_INDEX] = self.tensor(f"{module}.{GROUP_INDEX}")
        return self._packing.weight(module, parts)

    def has_rows(self, name: str) -> bool:
        """Whether rows of a matrix can be read alone: packed zero points of several rows share words."""
        return "weight_zero_point" not in self._packed.get(name, {})

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a matrix by index (N,), as [N, columns] in the stored dtype; others are not read, see has_rows."""
        if not self.has_rows(name):
            return self.tensor(name)[index]
        if not len(index):
            return torch.empty(0, self.shape(name)[1], dtype=self.dtype(name))
        unique, inverse = index.unique(return_inverse=True)
        if int(unique[0]) < 0 or int(unique[-1]) >= self.shape(name)[0]:
            wrong = int(unique[0]) if int(unique[0]) < 0 else int(unique[-1])
            raise UserError(f"row {wrong} of {name} in {self.path} does not exist: it has {self.shape(name)[0]} rows")
        # Consecutive rows are read in one call.
        starts = torch.cat([torch.tensor([0]), (unique.diff() != 1).nonzero()[:, 0] + 1])
        ends = torch.cat([starts[1:], torch.tensor([len(unique)])])
        runs = list(zip(unique[starts].tolist(), (ends - starts).tolist(), strict=True))
        return self._read_rows(name, runs)[inverse]

    def row_range(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive) of a matrix of which has_rows is true; other rows are not read."""
        return self._read_rows(name, [(first, last - first)])

    def _read_rows(self, name: str, runs: list[tuple[int, int]]) -> Tensor:
        """Rows of a matrix. runs: first row and number of rows of each run of consecutive rows."""
        if name not in self._packed:
            return self._place(name).read_rows(runs)
        assert self._packing is not None
        parts = {leaf: self._packed[name][leaf].read_rows(runs) for leaf in (PACKED, "weight_scale")}
        parts["weight_shape"] = torch.tensor([len(parts[PACKED]), self.shape(name)[1]])
        return self._packing.unpack(name.removesuffix(".weight"), parts)

    def check(self, name: str) -> None:
        """UserError where a tensor holds NaN or infinite values; of a packed weight only the scales are read.

        Matrices are read a few rows at a time: an embedding can be larger than all that is needed at once to run it.
        """
        if name in self._packed:
            self.check_finite(self._packed[name]["weight_scale"].read(), f"{name}_scale")
            return
        shape = self.shape(name)
        if len(shape) != 2:
            self.check_finite(self.tensor(name), name)
            return
        step = max(1, _CHECKED_BYTES // max(1, shape[1] * self.dtype(name).itemsize))
        for first in range(0, shape[0], step):
            self.check_finite(self.row_range(name, first, min(first + step, shape[0])), name)

    def check_finite(self, tensor: Tensor, name: str) -> None:
        """UserError, which names the tensor, where it holds NaN or infinite values."""
        if tensor.numel() and tensor.is_floating_point():
            # aminmax propagates NaN and needs no copy of the tensor.
            low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
            if not (low.isfinite() and high.isfinite()):
                kind = "NaN" if low.isnan() else "infinite"
                raise UserError(f"tensor {name} in {self.path} holds {kind} values: every weight must be finite")

    def fingerprint(self) -> str:
        """sha256 of config.json, the headers, and strips from start, middle and end of every tensor."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file, raw in sorted(self._headers):
            digest.update(file.encode() + b"\0" + raw)
        for name in sorted(self._stored):
            stored = self._stored[name]
            last = max(0, stored.nbytes - _STRIP_BYTES)
            for offset in (0, last // 2, last):
                digest.update(stored.strip(offset, _STRIP_BYTES))
        return digest.hexdigest()

    def _place(self, name: str) -> Stored:
        if name not in self._plain:
            raise UserError(f"tensor {name} is missing from {self.path}")
        return self._plain[name]


def read_json(path: Path) -> dict[str, Any]:
    """JSON object in a file of a checkpoint; UserError where the file is missing or holds no object."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give the folder of a transformers checkpoint")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: it must hold a JSON object")
    return content


def _shards(path: Path) -> dict[str, list[str]]:
    """Files of a checkpoint, each with the tensors that the index lists for it (none where there is no index)."""
    if (path / _SINGLE).is_file():
        return {_SINGLE: []}
    if (path / _INDEX).is_file():
        weight_map = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path / _INDEX} has no weight_map from names to files")
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
        return dict(sorted(files.items()))
    if any(path.glob("*.bin")):
        raise UserError(f"{path} has .bin weights only: convert them to safetensors with save_pretrained")
    raise UserError(f"{path} has neither {_SINGLE} nor {_INDEX}: give the folder of a transformers checkpoint")
