"""EAGLE's drafter: every node of a tree is drafted from the layer's output at its parent.

Source: Li et al. 2025, arXiv:2503.01840 (EAGLE-3).
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.eagle import Eagle


@dataclass(frozen=True)
class EagleDrafter(HeadDrafter):
    """Drafter with an EAGLE-3-style head."""

    name: ClassVar[str] = "eagle"
    head_type: ClassVar[type[DraftHead]] = Eagle
