"""Mixed: each layer of a model has a method of its own, such as the first one everything and the others four bits.

Source: precisions by layer as in KVTuner, Li et al. 2025, arXiv:2502.04420. Here any methods are mixed, and
`hasten search_cache` finds the mixture by an exact optimum or an evolutionary search.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hasten.accel.cache.base import CacheBudget, CacheLevel, CacheMethod, Kept, Place, Recent, check_budget
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError

_OPTION = "cache.assignment"


@dataclass(frozen=True)
class Mixed(CacheMethod):
    """Method that gives each layer a method and a budget.

    layers: of the first layers; the last of them holds for all layers behind, too. assignment: a file in place of
    `layers`, with one of them for each layer of the model, see `read`.
    """

    layers: Sequence[CacheLevel] = (CacheLevel(Full()), CacheLevel(KIVI(bits=4)))
    assignment: str | None = None

    has_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layers = self.layers if self.assignment is None else read(Path(self.assignment).expanduser())
        object.__setattr__(self, "layers", tuple(layers))
        if not self.layers:
            raise UserError("cache.layers=[] is wrong: give a method for the first layer")
        for level in self.layers:
            check_level(level)

    @property
    def interval(self) -> int:
        """The greatest number of tokens that divides the intervals of all layers."""
        return math.gcd(*(level.method.interval for level in self.layers))

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Layers are compressed by their own methods."""
        raise AssertionError

    def level_of(self, layer: int, layers: int, budget: CacheBudget | None) -> CacheLevel:
        """The layer's own; UserError where there are more of them than layers, or an assignment has fewer."""
        given = len(self.layers)
        if given > layers or (self.assignment is not None and given < layers):
            option = "cache.layers" if self.assignment is None else f"{_OPTION}={self.assignment}"
            raise UserError(f"{option} has {given} layers, the model {layers}")
        return self.layers[min(layer, given - 1)]


def check_level(level: CacheLevel) -> None:
    """UserError where a method cannot be that of one layer alone, or lacks a budget."""
    method = level.method
    if isinstance(method, Mixed) or method.joins_layers or method.reads_layers:
        raise UserError(f"cache={type(method).__name__} needs several layers: it cannot be the method of one")
    if isinstance(method, PromptMethod):
        raise UserError(f"cache={type(method).__name__} reads whole prompts: it cannot be the method of one layer")
    check_budget(method, level.budget)


def write(path: Path, levels: Mapping[str, CacheLevel], layers: Sequence[str]) -> None:
    """Write an assignment as JSON. levels: by name. layers: the name of each layer's level."""
    used = {name: _plain(levels[name]) for name in dict.fromkeys(layers)}
    path.write_text(json.dumps({"levels": used, "layers": list(layers)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[CacheLevel]:
    """Each layer's level of a JSON or YAML file; UserError names what is wrong with it.

    levels: by any name, the class of a method as `_target_`, its hyper-parameters, and its `budget`. layers: the name
    of each layer's level.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{_OPTION}={path} cannot be read ({type(error).__name__})") from None
    try:
        levels = {str(name): _level(path, settings) for name, settings in content["levels"].items()}
        return [levels[str(name)] for name in content["layers"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{_OPTION}={path} is wrong ({type(error).__name__}: {error}): expected levels, the methods by name with "
            "_target_, and layers, the name of each layer's level"
        ) from None


def _plain(level: CacheLevel) -> dict[str, Any]:
    method = level.method
    settings: dict[str, Any] = {"_target_": f"{type(method).__module__}.{type(method).__name__}"}
    settings |= vars(method)  # the fields of a frozen dataclass
    return settings if level.budget is None else {**settings, "budget": level.budget.value}


def _level(path: Path, settings: Mapping[str, Any]) -> CacheLevel:
    given = dict(settings)
    target, budget = str(given.pop("_target_")), given.pop("budget", None)
    module, _, name = target.rpartition(".")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        made = None
    if not (isinstance(made, type) and issubclass(made, CacheMethod)):
        raise UserError(f"{_OPTION}={path}: {target} is no cache method")
    return CacheLevel(made(**given), None if budget is None else CacheBudget(float(budget)))
