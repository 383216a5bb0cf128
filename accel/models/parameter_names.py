"""Which tensors of a checkpoint hold which parameters of transformers' model, by transformers' own rules.

transformers 5 renames tensors while it loads them: prefixes of multimodal checkpoints, `block_sparse_moe` for `mlp`,
and so on. Its rules are regular expressions for names, which are applied here to the names alone.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from hasten.accel.models.expert_names import local_expert

# An expert's tensor after renaming: the module of all experts, the expert's number, and the rest.
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
# Rules are the same for all experts: one number stands for all.
_ANY = "0"


class Sources(NamedTuple):
    """Names of the tensors that hold a parameter. axis: along which several are concatenated."""

    names: tuple[str, ...]
    axis: int = 0


def parameter_sources(model: Any, state: Collection[str], names: Iterable[str]) -> dict[str, Sources]:
    """Tensors of a checkpoint that hold the parameters and buffers of a model, by the names of the latter.

    state: names in the model, in which experts are fused. Those of the result have unfused experts, see models.experts:
    `model.layers.0.mlp.experts.3.gate_proj.weight`. names: of the checkpoint's tensors, experts unfused. Tensors that
    the model does not have are left out.
    """
    rules = _Rules(model, frozenset(state))
    found: dict[str, dict[int, str]] = {}
    axes: dict[str, int] = {}
    for name in names:
        renamed = rules.rename(name)
        if renamed is not None:
            parameter, place, axis = renamed
            found.setdefault(parameter, {})[place] = name
            axes[parameter] = axis
    return {
        parameter: Sources(tuple(parts[place] for place in sorted(parts)), axes[parameter])
        for parameter, parts in found.items()
    }


class _Rules:
    """transformers' rules for a model."""

    def __init__(self, model: Any, state: frozenset[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._state, self._prefix = state, f"{model.base_model_prefix}."
        self._experts: dict[str, str | None] = {}

    def rename(self, name: str) -> tuple[str, int, int] | None:
        """Parameter, place among its tensors, and axis; None where the model has no such parameter."""
        expert = _EXPERT.fullmatch(name)
        if expert:
            module, number, rest = expert.groups()
            if module not in self._experts:
                self._experts[module] = self._experts_of(module, rest)
            found = self._experts[module]
            local = local_expert(rest)
            return None if found is None or local is None else (f"{found}.{number}.{local}", 0, 0)
        renamed = self._renamed(name)
        parameter = self._in_model(renamed)
        if parameter is not None:
            return parameter, 0, 0
        return self._converted(renamed)

    def _renamed(self, name: str) -> str:
        for rule in self._renamings:
            name, _ = rule.rename_source_key(name)
        return name

    def _experts_of(self, module: str, rest: str) -> str | None:
        """Path of the module of all experts in the model."""
        renamed = self._renamed(f"{module}.{_ANY}.{rest}")
        match = _EXPERT.fullmatch(renamed)
        found = self._in_model(f"{match[1]}.down_proj") if match else None
        return None if found is None else found.removesuffix(".down_proj")

    def _converted(self, renamed: str) -> tuple[str, int, int] | None:
        """A tensor that transformers concatenates with others, by its place among them."""
        for rule in self._converters:
            target, pattern = rule.rename_source_key(renamed)
            if pattern is not None:
                operations = [type(operation).__name__ for operation in rule.operations]
                parameter = self._in_model(target)
                if operations != ["Concatenate"] or parameter is None:
                    return None
                return parameter, rule.source_patterns.index(pattern), rule.operations[0].dim
        return None

    def _in_model(self, name: str) -> str | None:
        """The name in the model: a base model's checkpoint lacks the prefix of the model with a head, or has it."""
        for form in (name, self._prefix + name, name.removeprefix(self._prefix)):
            if form in self._state:
                return form
        return None


def missing(sources: Mapping[str, Sources], needed: Iterable[str]) -> list[str]:
    """Parameters that no tensor of the checkpoint holds."""
    return [name for name in needed if name not in sources]
