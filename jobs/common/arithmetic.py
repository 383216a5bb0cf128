"""What `dtype=auto` and `device=auto` mean on this machine, and what a worker takes of its GPUs."""

import torch

from hasten.accel.errors import UserError
from hasten.cluster.runtime.resources import has_fast_bfloat16


def resolve_device(name: str) -> str:
    """`cpu` or `cuda`; UserError where cuda was asked for and there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here: use device=cpu or device=auto")
    return name


def gpus_per_worker(device: str) -> int:
    """GPUs of every process that computes on a `device` as an option gives it: one, none on a CPU."""
    return 1 if resolve_device(device) == "cuda" else 0


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """torch dtype of the arithmetic."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" or has_fast_bfloat16() else torch.float32
    found: torch.dtype = getattr(torch, name)
    return found


def dtype_choices(name: str, device: str) -> list[torch.dtype]:
    """The torch dtypes that decoding may use, to be chosen among by measurement if there are several.

    A CPU with matrix units for bfloat16 runs a pass of many tokens quicker in it, and a pass of one in float32.
    """
    if name == "auto" and device == "cpu" and has_fast_bfloat16():
        return [torch.float32, torch.bfloat16]
    return [resolve_dtype(name, device)]
