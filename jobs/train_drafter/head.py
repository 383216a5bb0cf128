"""The head that the options of `hasten train_drafter` choose."""

from collections.abc import Sized
from dataclasses import fields, replace

from torch import nn

from hasten.accel.errors import UserError
from hasten.accel.training.heads.base import Head
from hasten.jobs.cli.methods import build
from hasten.jobs.train_drafter.options import TrainDrafterConfig

# Options of the job that override the head's hyper-parameter of the same name; older than the option `head`.
_OVERRIDES = ("blocks", "mixing", "reject_weight", "epochs", "lr", "batch")


def chosen_head(config: TrainDrafterConfig) -> Head[Sized, nn.Module]:
    """config.head with hyper-parameters overridden by other options; UserError if the head lacks one of them."""
    head: Head[Sized, nn.Module] = build(config.head)
    if config.drafter not in (None, head.drafter):
        raise UserError(f"drafter={config.drafter} is wrong: expected {head.drafter}, which {_name(head)} is for")
    overrides = {name: getattr(config, name) for name in _OVERRIDES if getattr(config, name) is not None}
    for name in overrides:
        if name not in {field.name for field in fields(head)}:  # type: ignore[arg-type]
            raise UserError(f"{name}={overrides[name]} is wrong: {_name(head)} has no such hyper-parameter")
    return replace(head, **overrides)  # type: ignore[type-var]


def _name(head: Head[Sized, nn.Module]) -> str:
    return f"the head {type(head).__name__}"
