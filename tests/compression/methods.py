"""Every method of conf with every kind of level that it makes, and a layer with inputs of very different size."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.level import parse_level

_CONF = Path(__file__).parents[2] / "conf"
_METHODS = [
    path for family in ("quantizer", "column_quantizer", "pruner") for path in sorted((_CONF / family).glob("*.yaml"))
]
_LEVELS = ("w2g32", "w3g32a", "w4", "w8g32a", "c2.5", "c3", "s50", "s2of4", "s2of4w3g32")
ROWS, COLUMNS = 24, 96


def method_of(path):
    return instantiate(OmegaConf.load(path))


# (config of a method, name of a level) of every method.
SOLVES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path in _METHODS
    for name in _LEVELS
    if isinstance(method_of(path), parse_level(name).family)
]


def inputs_of(tokens=512, dead=()):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs *= torch.logspace(-1, 1, COLUMNS)
    inputs[:, list(dead)] = 0
    return inputs


def weight_of(dtype, size=0.05):
    return (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * size).to(dtype)


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian


def solved(path, name, weight, hessian):
    """The result of a method, and the weight that its level stores."""
    method, level = method_of(path), parse_level(name)
    result = level.make(method, weight, method.prepare(hessian))
    return result, level.unpack(level.pack(result.weight))
