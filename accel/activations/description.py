"""Schemes of inputs in a checkpoint's `quantization_config`, and the tensors that belong to them.

The form is compressed-tensors' QuantizationArgs: what hasten writes and what it reads, whichever program wrote it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.accel.activations.rounding import InputRounding
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError

# Names of a layer's tensors, behind the layer's name.
SCALE, ZERO_POINT, GLOBAL_SCALE = "input_scale", "input_zero_point", "input_global_scale"
INPUT_TENSORS = (SCALE, ZERO_POINT, GLOBAL_SCALE)
_SCALE_DTYPES = {"plain": None, "fp8": "torch.float8_e4m3fn", "power_of_two": "torch.uint8"}
_STRATEGIES = ("tensor", "token", "group", "tensor_group", "attn_head")


def described(scheme: InputScheme) -> dict[str, object]:
    """`input_activations` of a config group."""
    dynamic: bool | str = "local" if scheme.strategy == "tensor_group" else not scheme.static
    arguments: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": dynamic,
    }
    dtype = _SCALE_DTYPES[scheme.scale]
    # Zero points are not stored, but the library cannot name their type from 4-bit floats.
    return arguments if dtype is None else arguments | {"scale_dtype": dtype, "zp_dtype": dtype}


def parsed(arguments: Mapping[str, Any], where: str) -> InputScheme:
    """Scheme of a config group's `input_activations`; UserError where it is none that can be computed.

    where: what the arguments are of, for error messages.
    """
    bits, kind = arguments.get("num_bits", 8), str(arguments.get("type", "int"))
    strategy, group_size = arguments.get("strategy"), arguments.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "group"
    dynamic, symmetric = arguments.get("dynamic", False), bool(arguments.get("symmetric", True))
    supported = (kind == "int" and 2 <= bits <= 8) or (kind == "float" and bits in (4, 8) and symmetric)
    is_dynamic_only, is_static_only = strategy in ("group", "token"), strategy == "attn_head"
    if not supported or strategy not in _STRATEGIES or (is_static_only if dynamic else is_dynamic_only):
        shown = {name: arguments.get(name) for name in ("num_bits", "type", "symmetric", "strategy", "dynamic")}
        raise UserError(
            f"{where} has input_activations={shown}: supported are 2 to 8 bits of type int and 4 or 8 of type float "
            "(symmetric), with strategy tensor, attn_head (static), token, group (dynamic) or tensor_group (local)"
        )
    if strategy in ("group", "tensor_group") and not (isinstance(group_size, int) and group_size > 0 and symmetric):
        raise UserError(f"{where} has group_size={group_size} and symmetric={symmetric}: groups are symmetric")
    scale_dtype = str(arguments.get("scale_dtype") or "").removeprefix("torch.")
    scale = "fp8" if strategy == "tensor_group" else "power_of_two" if scale_dtype == "uint8" else "plain"
    group = group_size if strategy in ("group", "tensor_group") else None
    static = strategy != "tensor_group" and not dynamic
    return InputScheme(kind, bits, str(strategy), group, static, scale, symmetric)


def input_rounding(scheme: InputScheme, tensors: Mapping[str, Tensor], where: str) -> InputRounding:
    """Rounding by a scheme and a layer's INPUT_TENSORS, of which only those that the scheme needs are read.

    UserError where one is missing. where: the layer, for error messages.
    """
    needed = ([SCALE] if scheme.static else []) + ([GLOBAL_SCALE] if scheme.strategy == "tensor_group" else [])
    for name in needed:
        if name not in tensors:
            raise UserError(f"tensor {where}.{name} is missing: the inputs of this layer have a calibrated scale")
    zero_point = tensors.get(ZERO_POINT) if scheme.static and not scheme.symmetric else None
    return InputRounding(
        scheme,
        tensors[SCALE] if scheme.static else None,
        zero_point,
        tensors[GLOBAL_SCALE].to(torch.float32).reshape(1) if GLOBAL_SCALE in needed else None,
    )
