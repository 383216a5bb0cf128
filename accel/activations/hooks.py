"""Rotation and rounding of inputs, and rounding of attention states, inside a decoder block of transformers.

Linear layers rotate and round in hooks; an attention rounds in an attention function that is registered with
transformers and calls the one the model is configured with. So no model class is changed.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hasten.accel.activations.hadamard import InputHadamard
from hasten.accel.activations.rounding import InputRounding

_FUNCTION = "hasten_rounded_attention"
# As compressed-tensors recognises attentions that have a cache.
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
Observer = Callable[[Tensor, Tensor, Tensor], None]


def rotate_inputs(module: nn.Module, rotation: InputHadamard) -> None:
    """Make a layer rotate its inputs, before it rounds them. Called once, before hooks that read rotated inputs."""
    vars(module)["input_rotation"] = rotation
    module.register_forward_pre_hook(_rotate_inputs)


def rotated_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs that a layer's weight belongs to, for hooks that come before the one that rotates them."""
    rotation: InputHadamard | None = vars(module).get("input_rotation")
    return inputs if rotation is None else rotation(inputs)


def _rotate_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rotated_inputs(module, inputs[0]), *inputs[1:])


def prepare_inputs(module: nn.Module) -> None:
    """Make a layer round its inputs as soon as set_inputs says how; inputs that hooks before saw were not rounded."""
    if not hasattr(module, "input_rounding"):
        vars(module)["input_rounding"] = None
        module.register_forward_pre_hook(_round_inputs)


def set_inputs(module: Any, rounding: InputRounding | None) -> None:
    """Set how a layer's inputs are rounded; None leaves them as they are."""
    if rounding is not None:
        prepare_inputs(module)
        vars(module)["input_rounding"] = rounding.to(module.weight.device)
    elif hasattr(module, "input_rounding"):
        vars(module)["input_rounding"] = None


def rounds_inputs(module: nn.Module) -> bool:
    """Whether a layer rounds its inputs."""
    return getattr(module, "input_rounding", None) is not None


def _round_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    rounding = vars(module)["input_rounding"]
    return None if rounding is None else (rounding(inputs[0]), *inputs[1:])


class AttentionStates:
    """What happens to queries, keys and values [B, H, T, D] of one attention, after the rotary embedding.

    observe: sees them first; it may wait in the middle of the forward, until roundings are set. query, key, value:
    None leaves them as they are.
    """

    def __init__(self) -> None:
        self.observe: Observer | None = None
        self.query: InputRounding | None = None
        self.key: InputRounding | None = None
        self.value: InputRounding | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states with which the attention goes on."""
        if self.observe is not None:
            self.observe(query, key, value)
        pairs = ((self.query, query), (self.key, key), (self.value, value))
        query, key, value = (state if rounding is None else rounding(state) for rounding, state in pairs)
        return query, key, value


def attention_path(block: nn.Module) -> str | None:
    """Path in a block of its attention with a cache of keys and values; None where it has none."""
    for path, module in block.named_modules():
        if "attention" in type(module).__name__.lower() and any(hasattr(module, name) for name in _PROJECTIONS):
            return path
    return None


def attention_states(block: nn.Module) -> AttentionStates:
    """The states of a block's attention, to be changed; a block that has one, see attention_path."""
    path = attention_path(block)
    assert path is not None
    module: Any = block.get_submodule(path)
    if not hasattr(module, "attention_states"):
        _register()
        vars(module)["attention_states"] = AttentionStates()
        vars(module)["attention_function"] = module.config._attn_implementation
        # Masks are made by the model, whose config keeps the function that masks are made for.
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = _FUNCTION
    states: AttentionStates = vars(module)["attention_states"]
    return states


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_FUNCTION, _attend)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    states, function = vars(module)["attention_states"], vars(module)["attention_function"]
    # Every model has its own eager function, which is not registered.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(function, eager)
    return attend(module, *states(query, key, value), *args, **named)
