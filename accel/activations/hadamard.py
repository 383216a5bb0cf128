"""Hadamard rotations of the inputs of layers, which run with the model, and how compressed-tensors describes them.

Source: Ashkboos et al. 2024, arXiv:2404.00456 (before the down projection), called R4 by Liu et al. 2024,
arXiv:2405.16406. The form is that of compressed-tensors' transform_config, which vLLM reads: a transform of type
`hadamard` at the layer's `input`, whose inverse is in the weight, and the matrix of ones and minus ones once in the
files.
Departs from them: the matrix is Sylvester's, of the largest power of 2 that divides the channels, and repeats along
them. Of other sizes the format has only dense matrices, whose product costs as much as that of the layer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.kernels.walsh_hadamard import walsh_hadamard

# Largest matrix of vLLM's kernel.
_MAX_SIZE = 1 << 15
_NAME, _TYPE, _INPUT, _WEIGHT = "R4", "hadamard", "input", "weight_input"
# Locations of transforms that run with the model.
_ONLINE = (_INPUT, "output", "k_cache", "q_attn")


@dataclass(frozen=True)
class InputHadamard:
    """The rotation of inputs [..., C] by an orthogonal matrix (size, size) for each `size` consecutive channels.

    It is its own inverse, so a weight (R, C) for rotated inputs is the rotated weight.
    """

    size: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rotated inputs."""
        rotated: Tensor = _Rotate.apply(inputs, self.size)
        return rotated

    def matrix(self) -> Tensor:
        """The matrix times the root of its size, float32: ones and minus ones."""
        return walsh_hadamard(torch.eye(self.size) * self.size**0.5)[0].round()


class _Rotate(torch.autograd.Function):
    """The product, with its gradient: the matrix is symmetric."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, size: int) -> Tensor:
        context.size = size
        return walsh_hadamard(inputs.reshape(-1, size))[0].view(inputs.shape)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rotated: Tensor = _Rotate.apply(gradient, context.size)
        return rotated, None


def hadamard_of(columns: int) -> InputHadamard:
    """The rotation of inputs of so many channels; of an odd number it is of size 1, which leaves them as they are."""
    return InputHadamard(min(columns & -columns, _MAX_SIZE))


@dataclass(frozen=True)
class Described:
    """A transform of inputs in a transform_config. size: of its matrix; None for the number of channels."""

    name: str
    targets: Sequence[str]
    ignore: Sequence[str]
    size: int | None

    def matches(self, module: str) -> bool:
        """Whether the inputs of a linear layer with this name are rotated."""
        from compressed_tensors.utils.match import is_match

        return bool(is_match(module, torch.nn.Linear(1, 1, device="meta"), self.targets, self.ignore))

    def rotation(self, columns: int) -> InputHadamard:
        """The rotation of inputs of so many channels."""
        size = columns if self.size is None else self.size
        if size < 1 or size & (size - 1) or columns % size:
            raise UserError(
                f"{self.name} in transform_config has blocks of {size} of {columns} channels: supported are powers of "
                "2 that divide them"
            )
        return InputHadamard(size)


def described(size: int, targets: list[str], ignore: list[str]) -> dict[str, Any]:
    """A group of a transform_config: the rotation of inputs, and its inverse, which is in the weights."""
    sides = ((_INPUT, False), (_WEIGHT, True))
    return {
        "type": _TYPE,
        "apply": [
            {"targets": targets, "location": location, "inverse": inverse, "ignore": ignore}
            for location, inverse in sides
        ],
        "randomize": False,
        "requires_grad": False,
        "head_dim": size,
        "precision": "torch.float32",
    }


def groups_of(rotations: Mapping[str, InputHadamard]) -> dict[str, list[str]]:
    """Layers by group: `R4`, or one for each size of matrix where there are several."""
    several = len({rotation.size for rotation in rotations.values()}) > 1
    groups: dict[str, list[str]] = {}
    for layer, rotation in rotations.items():
        groups.setdefault(f"{_NAME}_{rotation.size}" if several else _NAME, []).append(layer)
    return groups


def tensor_name(group: str) -> str:
    """Name of a group's matrix below the name of a layer."""
    return f"{group}_{_INPUT}.weight"


def parsed(config: Mapping[str, Any] | None, where: str) -> list[Described]:
    """The transforms of a transform_config that run with the model; UserError where one is not of this kind."""
    groups = (config or {}).get("config_groups") or {}
    found = []
    for name, group in groups.items():
        for apply in group.get("apply") or []:
            location = apply.get("location")
            if location not in _ONLINE:
                continue
            if location != _INPUT or group.get("type") != _TYPE or group.get("randomize"):
                raise UserError(
                    f"{name} in the transform_config of {where} is of type {group.get('type')} at {location}: "
                    "supported are transforms of type hadamard, without randomize, at input; give the checkpoint that "
                    "it was made from"
                )
            targets, ignore = (_listed(apply.get(key)) for key in ("targets", "ignore"))
            found.append(Described(name, targets, ignore, group.get("head_dim")))
    return found


def is_online(config: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config has transforms that run with the model."""
    groups = ((config or {}).get("transform_config") or {}).get("config_groups") or {}
    return any(apply.get("location") in _ONLINE for group in groups.values() for apply in group.get("apply") or [])


def is_matrix(name: str, groups: Collection[str]) -> bool:
    """Whether a stored tensor is part of a transform of one of these groups."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return any(owner == f"{group}_{location}" for group in groups for location in (*_ONLINE, _WEIGHT, "weight_output"))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
