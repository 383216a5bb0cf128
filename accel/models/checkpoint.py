"""A checkpoint folder, whose tensors are read by name, one at a time, and never memory-mapped."""

import hashlib
import json
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.accel.activations.description import INPUT_TENSORS, input_rounding
from hasten.accel.activations.hadamard import InputHadamard
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.errors import UserError
from hasten.accel.models.expert_names import model_types, unfused
from hasten.accel.models.gguf.place import GgufTensor
from hasten.accel.models.gguf.source import FILE as GGUF_FILE
from hasten.accel.models.gguf.source import folder_of as gguf_folder
from hasten.accel.models.gguf.source import read_places
from hasten.accel.models.packed import CompressedWeight
from hasten.accel.models.quantized import CHECKED_BYTES, QuantizedTensor, belongs_to_activations
from hasten.accel.models.shards import Place, Stored, read_header
from hasten.accel.models.sources import open_quantization
from hasten.kernels.packed_weight import PackedWeight

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDED = "embedded:"
_GGUF = ".gguf"
# Types of weights.
_READ = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIP_BYTES = 4096
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# Terms of use, which a checkpoint that is made from the model must carry on.
_HUB_FILES += [
    f"*{word}*"
    for name in ("licence", "license", "notice", "copying", "copyright", "use_policy")
    for word in (name, name.capitalize(), name.upper())
]
_HUB_DUPLICATES = ["consolidated*", "original/*", "*.gguf"]


def resolve(model: str, weights: bool = True) -> Path:
    """Local folder of a model: `embedded:target`, a folder, a GGUF file, or a name on the hub, which is downloaded.

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
    if model and path.suffix == _GGUF and path.is_file():
        return gguf_folder(path)
    if model and path.exists():
        raise UserError(f"model={model!r} is a file: give the folder of a checkpoint, or a GGUF file")
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
    """Tensors of a checkpoint in safetensors or GGUF, by their logical names (see models.expert_names).

    Making one reads only config.json, the index and the headers; UserError names the file or the tensor where they do
    not fit together. Fused experts appear as separate tensors, and a quantized weight appears as the dequantized one
    (see models/sources.py); scales of activations do not appear.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"checkpoint {self.path} does not exist: give the folder of a transformers checkpoint")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._headers: list[tuple[str, bytes]] = []
        self._stored: dict[str, Stored] = {}
        self._blocks: dict[str, GgufTensor] = {}
        if (self.path / GGUF_FILE).is_file() and not _has_safetensors(self.path):
            raw, self._blocks = read_places(self.path / GGUF_FILE, self.config)
            self._headers.append((GGUF_FILE, raw))
        for file, names in () if self._blocks else _shards(self.path).items():
            raw, places = read_header(self.path / file)
            self._headers.append((file, raw))
            absent = [name for name in names if name not in places]
            if absent:
                raise UserError(f"tensor {absent[0]} is not in {self.path / file}, where the index puts it")
            self._stored |= places
        self.quantized_by = open_quantization(self.config, str(self.path / "config.json"))
        self._places = self._entries()
        self._check_dtypes()

    def _entries(self) -> dict[str, Place]:
        """Places of tensors by logical name."""
        stored: dict[str, Place] = dict(self._stored)
        if self.quantized_by is not None:
            quantized, claimed = self.quantized_by.tensors(self._stored)
            stored = {**{name: place for name, place in stored.items() if name not in claimed}, **quantized}
        activations = {name: place for name, place in self._stored.items() if belongs_to_activations(name)}
        self._activations = unfused(activations, model_types(self.config))
        return {**self._blocks, **unfused(stored, model_types(self.config))}

    def _check_dtypes(self) -> None:
        """UserError where a weight or bias is stored in a type that no job reads; buffers may have any type."""
        for name, place in self._places.items():
            module, _, leaf = name.rpartition(".")
            # Some models have a buffer called bias, a mask, in a module without a weight.
            is_parameter = leaf == "weight" or (leaf == "bias" and f"{module}.weight" in self)
            if is_parameter and place.dtype not in _READ:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _READ)
                raise UserError(
                    f"tensor {name} in {place.file} is stored as {str(place.dtype).removeprefix('torch.')}: weights "
                    f"must be {known}, or config.json must have the quantization_config that says what they stand for"
                )

    @property
    def names(self) -> list[str]:
        """Logical names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def is_compressed(self) -> bool:
        """Whether some weights are quantized."""
        return any(isinstance(place, QuantizedTensor) for place in self._places.values())

    @property
    def quantization_title(self) -> str | None:
        """How its weights are quantized, in a few words; None where none is."""
        return self.quantized_by.title if self.quantized_by is not None and self.is_compressed else None

    @property
    def rounds_inputs(self) -> bool:
        """Whether servers round inputs of some layers, or keys and values, by the checkpoint's config."""
        return self.quantized_by is not None and self.quantized_by.rounds_inputs

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a quantized weight, that of the dequantized one."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype; of a quantized weight, that in which it is dequantized."""
        return self._place(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor that `tensor` returns without a dtype."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk; of a quantized weight, codes, scales and zero points together."""
        return self._place(name).nbytes

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is a weight in packed integers, which `packed` reads as it is stored."""
        place = self._places.get(name)
        return isinstance(place, CompressedWeight) and place.is_packed

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        place = self._places.get(name)
        return isinstance(place, QuantizedTensor) or (isinstance(place, GgufTensor) and place.is_quantized)

    def quantization(self, name: str) -> "QuantizationArgs | None":
        """compressed-tensors' QuantizationArgs of a quantized weight; None for a plain tensor."""
        place = self._places.get(name)
        return place.arguments if isinstance(place, QuantizedTensor) else None

    def inputs(self, layer: str) -> InputRounding | None:
        """How servers round the inputs of a layer; None where they do not."""
        scheme = None if self.quantized_by is None else self.quantized_by.inputs(layer)
        if scheme is None:
            return None
        stored = {name: self._activations.get(f"{layer}.{name}") for name in INPUT_TENSORS}
        tensors = {name: place.read() for name, place in stored.items() if place is not None}
        return input_rounding(scheme, tensors, layer)

    def input_rotation(self, layer: str) -> InputHadamard | None:
        """How the inputs of a layer are rotated before they are rounded; None where they are not."""
        if self.quantized_by is None or f"{layer}.weight" not in self:
            return None
        return self.quantized_by.input_rotation(layer, self.shape(f"{layer}.weight")[-1])

    def attention(self, name: str, classes: Collection[str]) -> dict[str, InputRounding]:
        """How servers round keys `k`, values `v` and queries `q` of an attention; empty where they do not.

        name: of the attention's module. classes: names of its class and base classes.
        """
        scheme = None if self.quantized_by is None else self.quantized_by.attention(classes)
        if scheme is None:
            return {}
        missing = [part for part in scheme.names if f"{name}.{part}" not in self._activations]
        if missing:
            raise UserError(f"tensor {name}.{missing[0]} is missing from {self.path}: the config has an FP8 KV cache")
        scales = {part: self._activations[f"{name}.{part}"].read() for part in scheme.names}
        return {part[0]: scheme.rounding(scales, part[0]) for part in scheme.names}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A private copy of a tensor; dtype None is that of `dtype`."""
        tensor = self._place(name).read()
        return tensor if dtype is None else tensor.to(dtype)

    def packed(self, name: str) -> PackedWeight:
        """A weight in packed integers as it is stored, in new memory."""
        place = self._places[name]
        assert isinstance(place, CompressedWeight)
        return place.packed()

    def has_rows(self, name: str) -> bool:
        """Whether rows of a matrix can be read alone; those of some quantized weights share words or scales."""
        place = self._places.get(name)
        return not isinstance(place, QuantizedTensor) or place.has_rows

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
        return self._place(name).read_rows(runs)

    def check(self, name: str) -> None:
        """UserError where a tensor holds NaN or infinite values; of a quantized one, where its floats or scales do.

        Matrices are read a few rows at a time: an embedding can be larger than all that is needed at once to run it.
        """
        place = self._place(name)
        if isinstance(place, QuantizedTensor):
            place.check(self.check_finite)
            return
        shape = self.shape(name)
        if len(shape) != 2:
            self.check_finite(self.tensor(name), name)
            return
        step = max(1, CHECKED_BYTES // max(1, shape[1] * self.dtype(name).itemsize))
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
        places: dict[str, Stored | GgufTensor] = {**self._stored, **self._blocks}
        for _, stored in sorted(places.items()):
            last = max(0, stored.nbytes - _STRIP_BYTES)
            for offset in (0, last // 2, last):
                digest.update(stored.strip(offset, _STRIP_BYTES))
        return digest.hexdigest()

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise UserError(f"tensor {name} is missing from {self.path}")
        return self._places[name]


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


def _has_safetensors(path: Path) -> bool:
    return (path / _SINGLE).is_file() or (path / _INDEX).is_file()


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
