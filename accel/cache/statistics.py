"""Files of calibrated statistics: one for a method, in a folder `cache_statistics` beside the weights of a checkpoint.

In a folder of their own, because servers load every safetensors file that lies beside the weights.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, settings
from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole

FOLDER = "cache_statistics"
# Metadata of several entries are written in a random order.
_NOTE = "hasten"
_JOB = "hasten calibrate_cache"


@dataclass(frozen=True)
class Statistics:
    """Statistics of a method for a model. layers: by layer. note: what they were made from."""

    layers: Sequence[LayerTensors]
    note: Mapping[str, Any]


def file_name(method: CacheMethod) -> str:
    """Name of the file of a method's statistics, such as KVQuant-bits=3-outliers=0.01.safetensors."""
    fields = (f"-{name}={value}" for name, value in settings(method).items())
    return f"{type(method).__name__}{''.join(fields)}.safetensors"


def write_layers(path: Path, layers: Sequence[LayerTensors], note: Mapping[str, Any]) -> None:
    """Write tensors of layers, whole or not at all."""
    tensors = {f"{layer}.{name}": part.contiguous() for layer, own in enumerate(layers) for name, part in own.items()}
    metadata = {_NOTE: json.dumps({"layers": len(layers), **note}, sort_keys=True)}
    needed = sum(part.nbytes for part in tensors.values())
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata), needed)


def read_layers(path: Path) -> Statistics:
    """What was written; UserError where the file is damaged or another one."""
    try:
        with safe_open(path, "pt") as file:
            note: dict[str, Any] = json.loads((file.metadata() or {})[_NOTE])
            layers: list[dict[str, Tensor]] = [{} for _ in range(note["layers"])]
            for key in sorted(file.keys()):
                number, _, name = key.partition(".")
                layers[int(number)][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError, IndexError):
        raise UserError(f"{path} holds no statistics of a cache: {_JOB} makes them") from None
    return Statistics(layers, note)


def find(method: CacheMethod, checkpoint: Path, given: Path | None) -> Path | None:
    """File of a method's statistics.

    given: the file, or the folder that it is in; None looks beside the checkpoint, where there may be none. UserError
    where the given one is missing, or the method has no statistics.
    """
    if not isinstance(method, Calibrated):
        if given is not None:
            raise UserError(f"cache={type(method).__name__} has no calibrated statistics: leave out {given}")
        return None
    if given is None:
        beside = checkpoint / FOLDER / file_name(method)
        return beside if beside.is_file() else None
    path = given / file_name(method) if given.is_dir() else given
    if not path.is_file():
        raise UserError(f"{path} does not exist: {_JOB} makes statistics of cache={type(method).__name__}")
    return path


def load(method: CacheMethod, path: Path, models: Collection[str] | None = None) -> Statistics:
    """Statistics of a method; UserError where they are of another method, of other hyper-parameters or another model.

    models: fingerprints of checkpoints that they may be of; None checks none.
    """
    found = read_layers(path)
    name, own = type(method).__name__, dict(settings(method))
    if found.note.get("method") != name or found.note.get("settings") != own:
        made = f"{found.note.get('method')} with {found.note.get('settings')}"
        raise UserError(f"{path} is of {made}, not of {name} with {own}: run {_JOB} for it")
    if models is not None and found.note.get("model") not in models:
        raise UserError(f"{path} is of another model ({found.note.get('checkpoint')}): run {_JOB} for this one")
    return found


def check_layers(statistics: Statistics, layers: int) -> None:
    """UserError where statistics are of a model with another number of layers."""
    if len(statistics.layers) != layers:
        raise UserError(f"the statistics are of {len(statistics.layers)} layers, the model has {layers}: run {_JOB}")
