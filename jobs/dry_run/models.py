"""The models that a config names, for plans: shapes of checkpoints, without reading a weight."""

import dataclasses
from functools import cache
from typing import Protocol, TypeVar

from hasten.accel.costs.model import Model
from hasten.accel.costs.outline import open_checkpoint
from hasten.accel.decoding.targets.families import refusal
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.common.arithmetic import resolve_dtype
from hasten.jobs.common.schema import Calibrated
from hasten.jobs.dry_run.setting import Shapes

C = TypeVar("C", bound=Calibrated)


class OfOneModel(Protocol):
    """Options of a job that computes with one model."""

    model: str
    dtype: str


def shapes(config: OfOneModel, gpus: int) -> Shapes:
    """Shapes of the checkpoint in the option `model`."""
    return shapes_of(model_of("model", config.model, config.dtype, gpus))


def shapes_of(model: Model) -> Shapes:
    """Shapes of a model."""
    return Shapes(model.dtype, model.hidden, model.inner)


def model_of(option: str, name: str, dtype: str, gpus: int) -> Model:
    """Shapes of an option's checkpoint, in the dtype that another option asks for; UserError names the option."""
    return Model(_architecture(option, name), resolve_dtype(dtype, "cuda" if gpus else "cpu"))


@cache
def _architecture(option: str, name: str) -> Architecture:
    try:
        return Architecture(open_checkpoint(resolve(name, weights=False).absolute()))
    except UserError as error:
        raise UserError(str(error).replace("model=", f"{option}=", 1)) from None


def is_fast(path: str, model: Model) -> bool:
    """Whether decoding uses the fast path for the model, not transformers; path: the option of that name."""
    return path != "transformers" and refusal(model.architecture.config) is None


def with_local_arithmetic(config: C) -> C:
    """The config with a device and dtype of this machine, which may lack the planned GPUs and checks the settings."""
    return dataclasses.replace(config, device="cpu", dtype="float32")
