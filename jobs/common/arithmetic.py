"""The options `dtype` and `device` on this machine, and the GPUs of a worker."""

import torch

from hasten.accel.errors import UserError
from hasten.cluster.runtime.resources import has_fast_bfloat16


def resolve_device(name: str) -> str:
    """`cpu` or `cuda`; UserError if cuda was requested and there is no CUDA device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here: use device=cpu or device=auto")
    return name


def gpus_per_worker(device: str) -> int:
    """GPUs of every process for a value of the option `device`: one, or none if it computes on the CPU."""
    return 1 if resolve_device(device) == "cuda" else 0


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """torch dtype of the arithmetic."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" or has_fast_bfloat16() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_choices(name: str, device: str) -> list[torch.dtype]:
    """The torch dtypes that decoding may use; if there are several, the caller measures which is fastest.

    A CPU with matrix units for bfloat16 is faster in bfloat16 for passes of many tokens, and in float32 for one token.
    """
    if name == "auto" and device == "cpu" and has_fast_bfloat16():
        return [torch.float32, torch.bfloat16]
    return [resolve_dtype(name, device)]
