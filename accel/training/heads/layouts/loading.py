"""Finds the layout of a folder, loads its head, and writes trained heads in other layouts."""

import importlib
import inspect
import json
import pkgutil
import shutil
import uuid
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


def export_head(folder: Path, layout: str, target: str, output: Path) -> None:
    """Write the trained head of a folder in a layout, into a new folder, which is whole once it is there.

    target: what others call the target. UserError if the folder holds no head, or one that the layout cannot hold.
    """
    if layout not in layouts():
        raise UserError(f"layout={layout} is wrong: expected {' or '.join(layouts())}")
    if output.exists():
        raise UserError(f"output={output} exists: give a new folder")
    try:
        kind = json.loads((folder / CONFIG).read_text())["head"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"head={folder} is no folder of a trained head: train one with hasten train") from error
    kinds = {head.drafter: head for head in layouts()[layout].heads}
    if kind not in kinds:
        raise UserError(f"head={folder} is a head of {kind}: the layout {layout} holds {', '.join(kinds)} only")
    head, network, config = load_head(folder, kinds[kind])
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        layouts()[layout].write(network, head, temporary, TargetFacts(**config["target"]), target)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
