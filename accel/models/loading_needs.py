"""Model types that transformers 5.23 cannot load compressed by itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.accel.models.checkpoint import read_json
from hasten.accel.models.expert_names import GRANITES, model_types

# See initialises_layers and fuses_experts.
_INITIALISED = frozenset(("mamba", "mamba2", "falcon_mamba", "recurrent_gemma"))
_PUBLISHED_FUSED = frozenset(("gpt_oss", "aria", "aria_text")) | GRANITES


def initialises_layers(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5.23 initialises weights of layers of a model that it loads, which packed layers lack."""
    return not _INITIALISED.isdisjoint(model_types(config))


def fuses_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5.23 has no rules for experts of a model that a checkpoint stores one by one."""
    return not _PUBLISHED_FUSED.isdisjoint(model_types(config))


def register_loader(folder: Path) -> None:
    """Let transformers load the checkpoint in a folder: registers hasten's loader, where it is quantized."""
    if read_json(folder / "config.json").get("quantization_config"):
        import hasten.accel.models.transformers_loader  # noqa: F401
