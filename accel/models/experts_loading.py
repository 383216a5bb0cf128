"""How transformers fuses experts that a checkpoint stores one by one, where transformers has no rules of its own.

transformers 5.23 has rules for most model types. gpt-oss, Llama 4, Granite and Aria publish fused experts, so it has
none for theirs; servers read the experts of their compressed checkpoints one by one all the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, _IdentityOp

from hasten.accel.models.expert_names import model_types, stored_projection
from hasten.accel.models.experts import DOWN, GATE, UP, Layout, is_fused


class FuseExperts(ConversionOps):
    """Joins the projections of all experts in one tensor of a module's layout."""

    def __init__(self, layout: Layout, bias: bool) -> None:
        self._layout, self._bias = layout, bias

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor by its pattern, from the projections in the order of source_patterns."""
        parts = []
        for pattern in source_patterns:
            if pattern in input_dict:
                tensors = input_dict.pop(pattern)
                parts.append(tensors if isinstance(tensors, Tensor) else torch.stack(tensors))
        if self._layout.interleaved and len(parts) > 1:
            whole = torch.stack(parts, 2).flatten(1, 2)
        else:
            whole = torch.cat(parts, 1)
        if self._layout.transposed and not self._bias:
            whole = whole.mT.contiguous()
        return {target_patterns[0]: whole}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saved as the module holds it."""
        return _IdentityOp()


def missing_rules(model: Any, rules: list[Any]) -> list[WeightConverter]:
    """Rules for the experts of a model that its own rules do not fuse."""
    targets = [
        target
        for rule in rules
        if isinstance(rule, WeightConverter) and any("*" in source for source in rule.source_patterns)
        for target in rule.target_patterns
    ]
    added: dict[str, WeightConverter] = {}
    types = model_types(model.config.to_dict())
    for path, module in model.named_modules():
        if is_fused(module) and not any(f"{path}.{DOWN}".endswith(target.lstrip("^\\.")) for target in targets):
            tail = ".".join(path.split(".")[-2:])
            for rule in _rules(tail, Layout.of(module), types):
                added.setdefault(rule.target_patterns[0], rule)
    return list(added.values())


def _rules(tail: str, layout: Layout, types: frozenset[str]) -> Iterator[WeightConverter]:
    """tail: the last two parts of the path of the module of all experts."""
    first = (GATE, UP) if layout.has_gate else (UP,)
    fused = "gate_up_proj" if layout.has_gate else UP
    for projections, target in ((first, fused), ((DOWN,), DOWN)):
        names = [stored_projection(name, types) for name in projections]
        for leaf, suffix in (("weight", ""), ("bias", "_bias")):
            if leaf == "weight" or layout.has_bias:
                sources = [f"{tail}.*.{name}.{leaf}" for name in names]
                yield WeightConverter(sources, f"{tail}.{target}{suffix}", [FuseExperts(layout, leaf == "bias")])
