"""What `dtype=auto` and `device=auto` mean on this machine."""

from typing import Any

from hasten.accel.errors import UserError


def resolve_device(name: str) -> str:
    """`cpu` or `cuda`; UserError where cuda was asked for and there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here: use device=cpu or device=auto")
    return name


def resolve_dtype(name: str, device: str) -> Any:
    """torch dtype of the arithmetic."""
    import torch

    from hasten.cluster.runtime.resources import has_fast_bfloat16

    if name == "auto":
        return torch.bfloat16 if device == "cuda" or has_fast_bfloat16() else torch.float32
    return getattr(torch, name)


def dtype_choices(name: str, device: str) -> list[Any]:
    """The torch dtypes that decoding may use, to be chosen among by measurement if there are several.

    A CPU with matrix units for bfloat16 runs a pass of many tokens quicker in it, and a pass of one in float32.
    """
    import torch

    from hasten.cluster.runtime.resources import has_fast_bfloat16

    if name == "auto" and device == "cpu" and has_fast_bfloat16():
        return [torch.float32, torch.bfloat16]
    return [resolve_dtype(name, device)]
