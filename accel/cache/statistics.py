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
from hasten.accel.cache.mixed import Mixed
from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole

FOLDER = "cache_statistics"
# Metadata of several entries are written in a random order.
_NOTE = "hasten"
_JOB = "hasten calibrate_cache"


@dataclass(frozen=True)
class Statistics:
    """Statistics of a method for a model. layers: by layer, empty where its method has none. note: their origin."""

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


def calibrated_in(method: CacheMethod) -> list[CacheMethod]:
    """The method if it has calibrated statistics, or those methods of a mixture's layers that have, each once."""
    methods = [level.method for level in method.layers] if isinstance(method, Mixed) else [method]
    return list({file_name(one): one for one in methods if isinstance(one, Calibrated)}.values())


def find(method: CacheMethod, checkpoint: Path, given: Path | None) -> Path | None:
    """File of a method's statistics, or the folder of those of a mixture's methods.

    given: the file, or the folder that it is in; None looks beside the checkpoint, where there may be none, or not all
    of a mixture's. UserError where a given one is missing, or the method has no statistics.
    """
    wanted = calibrated_in(method)
    if not wanted:
        if given is not None:
            what = "the methods have" if isinstance(method, Mixed) else f"cache={type(method).__name__} has"
            raise UserError(f"{what} no calibrated statistics: leave out {given}")
        return None
    if given is None:
        beside = [file for one in wanted if (file := checkpoint / FOLDER / file_name(one)).is_file()]
        return None if not beside else beside[0].parent if isinstance(method, Mixed) else beside[0]
    if isinstance(method, Mixed) and not given.is_dir():
        raise UserError(f"{given} is no folder: each method of a mixture has a file of statistics of its own in one")
    for one in wanted:
        path = given / file_name(one) if given.is_dir() else given
        if not path.is_file():
            raise UserError(f"{path} does not exist: {_JOB} makes statistics of cache={type(one).__name__}")
    return given if isinstance(method, Mixed) else path


def files_of(method: CacheMethod, path: Path) -> dict[str, Path]:
    """Files of what `find` found, by name; of a mixture those that there are."""
    if not isinstance(method, Mixed):
        return {file_name(method): path}
    files = {file_name(one): path / file_name(one) for one in calibrated_in(method)}
    return {name: file for name, file in files.items() if file.is_file()}


def load(method: CacheMethod, path: Path, models: Collection[str] | None = None) -> Statistics:
    """Statistics of a method; UserError where they are of another method, of other hyper-parameters or another model.

    path: see find. models: fingerprints of checkpoints that they may be of; None checks none.
    """
    if isinstance(method, Mixed):
        methods = {file_name(one): one for one in calibrated_in(method)}
        own = {name: load(methods[name], file, models) for name, file in files_of(method, path).items()}
        return of_mixture(method, own)
    found = read_layers(path)
    name, chosen = type(method).__name__, dict(settings(method))
    if found.note.get("method") != name or found.note.get("settings") != chosen:
        made = f"{found.note.get('method')} with {found.note.get('settings')}"
        raise UserError(f"{path} is of {made}, not of {name} with {chosen}: run {_JOB} for it")
    if models is not None and found.note.get("model") not in models:
        raise UserError(f"{path} is of another model ({found.note.get('checkpoint')}): run {_JOB} for this one")
    return found


def of_mixture(method: Mixed, found: Mapping[str, Statistics]) -> Statistics:
    """Statistics of the layers' own methods. found: of methods, by the names of their files, at least one."""
    count = len(next(iter(found.values())).layers)
    layers: list[LayerTensors] = []
    for number in range(count):
        own = method.level_of(number, count, None).method
        statistics = found.get(file_name(own)) if isinstance(own, Calibrated) else None
        layers.append({} if statistics is None else statistics.layers[number])
    return Statistics(layers, {})


def check_layers(statistics: Statistics, layers: int) -> None:
    """UserError where statistics are of a model with another number of layers."""
    if len(statistics.layers) != layers:
        raise UserError(f"the statistics are of {len(statistics.layers)} layers, the model has {layers}: run {_JOB}")
