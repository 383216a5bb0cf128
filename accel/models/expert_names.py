"""Names of experts' tensors in checkpoints, and which part of a stored tensor of all experts each of them is.

Names are those that servers read: a tensor for each expert and projection, whichever form a checkpoint stores.
transformers' own names of the projections stand for Mixtral's `w1`, `w3` and `w2`, too.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.models.experts import DOWN, GATE, UP, is_transposed
from hasten.accel.models.shards import Place, StoredPart

_NUMBERED = {GATE: "w1", UP: "w3", DOWN: "w2"}
# Model types whose mixtures servers know by Mixtral's names: those whose mixture is `mlp` in transformers' modules and
# `block_sparse_moe` in checkpoints, and those whose modules have the checkpoint's name.
_BLOCK_SPARSE = frozenset(("mixtral", "minimax", "minimax_m2", "phimoe", "kimi_linear"))
GRANITES = frozenset(("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"))
_WITH_NUMBERS = _BLOCK_SPARSE | GRANITES | {"lfm2_moe"}
_MODULE_FORM = re.compile(r"(.*\blayers\.\d+\.)mlp\.(.+)")
# Model types that interleave the columns of gate and up projection.
_INTERLEAVED = frozenset(("gpt_oss",))
# Stored tensors of all experts: those of transformers' modules, Aria's and Granite's.
_FUSED = re.compile(r"(.+)\.experts\.(gate_up_proj|up_proj|down_proj)(_bias)?|(.+)\.experts\.(fc[12])\.weight")
_EXPERT = re.compile(rf"((?:.+\.)?experts\.\d+\.)({GATE}|{UP}|{DOWN})(\..+)?")
_GRANITE = re.compile(r"(.+)\.(input|output)_linear\.weight")


@dataclass(frozen=True)
class StoredBias(StoredPart):
    """Entries of one vector of a matrix; vector: its number."""

    vector: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """See Place."""
        return (len(range(self.first, self.last, self.step)),)

    def read(self) -> Tensor:
        """See Place."""
        return self.matrix.read_rows([(self.vector, 1)])[0, self.entries].clone()


@dataclass(frozen=True)
class _Fused:
    """A tensor of all experts. projections: of each expert, in the order in which they are stored. bias: of biases."""

    module: str
    projections: tuple[str, ...]
    bias: bool
    transposed: bool
    interleaved: bool


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Model types in a checkpoint's config: its own, and that of the text model of a multimodal one."""
    text = config.get("text_config")
    found = {config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None}
    return frozenset(name for name in found if isinstance(name, str))


def unfused(places: Mapping[str, Place], types: Collection[str]) -> dict[str, Place]:
    """Places of tensors by the names that servers read, one for each expert and projection, from those by stored name.

    types: see model_types.
    """
    found: dict[str, Place] = {}
    for name, place in places.items():
        fused = _fused(name, places, types)
        if fused is None:
            found[canonical(name, types)] = place
            continue
        module = canonical(fused.module, types)
        for expert in range(place.shape[0]):
            for projection, part in zip(fused.projections, _parts(place, expert, fused), strict=True):
                leaf = stored_projection(projection, types)
                found[f"{module}.{expert}.{leaf}.{'bias' if fused.bias else 'weight'}"] = part
    return found


def stored_projection(name: str, types: Collection[str]) -> str:
    """Name of a projection of an expert in checkpoints of a model type, such as w1 for gate_proj."""
    return name if _WITH_NUMBERS.isdisjoint(types) else _NUMBERED[name]


def stored_expert(local: str, types: Collection[str]) -> str:
    """Name in a checkpoint of a block's tensor, whose name below the block is `local` if it is no expert's."""
    match = _EXPERT.fullmatch(local)
    return f"{match[1]}{stored_projection(match[2], types)}{match[3] or ''}" if match else local


def canonical(name: str, types: Collection[str]) -> str:
    """The name with Mixtral's name of the mixture, where the model has it and the name is of transformers' module."""
    match = _MODULE_FORM.fullmatch(name) if not _BLOCK_SPARSE.isdisjoint(types) else None
    return f"{match[1]}block_sparse_moe.{match[2]}" if match else name


def _fused(name: str, places: Mapping[str, Place], types: Collection[str]) -> _Fused | None:
    """How a tensor of all experts is stored; None for other tensors."""
    match, granite = _FUSED.fullmatch(name), False
    if match:
        parent, kind = match[1] or match[4], match[2] or match[5]
        bias = match[3] is not None
        first, last = (
            next((other for key in keys if (other := places.get(f"{parent}.experts.{key}")) is not None), None)
            for keys in (("gate_up_proj", "up_proj", "fc1.weight"), ("down_proj", "fc2.weight"))
        )
    else:
        match = _GRANITE.fullmatch(name)
        granite = match is not None and not GRANITES.isdisjoint(types)
        if match is None or not granite:
            return None
        parent, kind, bias = match[1], match[2], False
        first, last = (places.get(f"{parent}.{key}_linear.weight") for key in ("input", "output"))
    if first is None or last is None or len(first.shape) != 3 or len(last.shape) != 3:
        return None
    gated = kind != "up_proj" and f"{parent}.experts.up_proj" not in places
    is_last = kind in ("down_proj", "fc2", "output")
    return _Fused(
        module=f"{parent}.experts",
        projections=(DOWN,) if is_last else (GATE, UP) if gated else (UP,),
        bias=bias,
        transposed=is_transposed(first.shape, last.shape, 2 if gated else 1),
        interleaved=not is_last and not _INTERLEAVED.isdisjoint(types),
    )


def _parts(place: Any, expert: int, fused: _Fused) -> Iterator[Place]:
    """Places of an expert's projections in a tensor of all experts."""
    count = len(fused.projections)
    outputs = place.shape[2] if fused.transposed and not fused.bias else place.shape[1]
    for number in range(count):
        if fused.interleaved:
            bounds = (number, outputs, count)
        else:
            bounds = (number * outputs // count, (number + 1) * outputs // count, 1)
        if fused.bias:
            yield StoredBias(place, *bounds, vector=expert)
        elif fused.transposed:
            yield place.columns(expert, *bounds)
        elif fused.interleaved:
            raise UserError(f"tensor of {fused.module} in {place.file} interleaves rows, which is not supported")
        else:
            yield place.part(expert, *bounds[:2])
