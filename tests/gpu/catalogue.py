"""Methods from conf without Hydra, which a GPU machine need not have."""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

_CONF = Path(__file__).parents[2] / "conf"


def configs(family: str) -> list[Path]:
    """Config files of a family, such as `drafter`, in the order of their names."""
    return sorted((_CONF / family).glob("*.yaml"))


def build(config: Path) -> Any:
    """The method that a config file describes."""
    return _build(yaml.safe_load(config.read_text()))


def _build(node: Any) -> Any:
    if isinstance(node, list):
        return [_build(value) for value in node]
    if not isinstance(node, dict):
        return node
    values = {name: _build(value) for name, value in node.items() if name != "_target_"}
    if "_target_" not in node:
        return values
    module, _, name = node["_target_"].rpartition(".")
    return getattr(import_module(module), name)(**values)
