"""Finds the layout of a folder, and loads its head."""

import importlib
import inspect
import pkgutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.accel.training.heads import layouts as package
from hasten.accel.training.heads.draft_head import CONFIG, DraftHead, DraftNetwork, TargetFacts, load_head
from hasten.accel.training.heads.layouts.base import Layout


@cache
def layouts() -> dict[str, Layout]:
    """All layouts by name."""
    found: dict[str, Layout] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        path = f"{package.__name__}.{module.name}"
        for member in vars(importlib.import_module(path)).values():
            own = inspect.isclass(member) and issubclass(member, Layout) and member.__module__ == path
            if own and not inspect.isabstract(member):
                found[member.name] = member()
    return found


def layout_of(folder: Path) -> Layout | None:
    """The layout of a folder; None if it has none of other programs'."""
    return next((layout for layout in layouts().values() if layout.matches(folder)), None)


def load_any_head(
    folder: Path, head_type: type[DraftHead], target: TargetFacts | None = None
) -> tuple[DraftHead, DraftNetwork, dict[str, Any]]:
    """`load_head`, also of a folder in another program's layout, whose config has no measured acceptance."""
    layout = None if (folder / CONFIG).is_file() else layout_of(folder)
    if layout is None:
        return load_head(folder, head_type, target)
    if target is None:
        raise UserError(f"head={folder} is in the layout {layout.name}: it can be read only where its target is")
    head, network = layout.read(folder, target)
    if head.drafter != head_type.drafter:
        raise UserError(f"head={folder} is a head of {head.drafter}: expected one of {head_type.drafter}")
    config = {"head": head.drafter, "target": asdict(target)}
    return head, network, config
