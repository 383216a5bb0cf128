"""Reads heads of any layout: ours, or one of those that other programs write."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, TargetFacts, load_head
from hasten.accel.training.heads.layouts.base import Layout
from hasten.accel.training.heads.layouts.speculators import Speculators

LAYOUTS: tuple[Layout, ...] = (Speculators(),)


def read_head(
    folder: Path, head_type: type[DraftHead], target: TargetFacts | None = None
) -> tuple[DraftHead, DraftNetwork, dict[str, Any]]:
    """Head, network in float32 and config of a folder, as `load_head` does; UserError if it holds no such head.

    The config of another layout than ours has the keys `head`, `target` and `layout`, and no measured acceptance.
    """
    layout = next((layout for layout in LAYOUTS if layout.matches(folder)), None)
    if layout is None:
        return load_head(folder, head_type, target)
    if layout.head_type is not head_type:
        raise UserError(
            f"head={folder} is a head of {layout.head_type.drafter} in the layout of {layout.name}: expected one of "
            f"{head_type.drafter}"
        )
    if target is None:
        raise UserError(
            f"head={folder} is in the layout of {layout.name}, which does not say all of the target's sizes, and the "
            "target has no folder: load it from one"
        )
    head, network = layout.read(folder, target)
    return head, network, {"head": head.drafter, "layout": layout.name, "target": asdict(target)}
