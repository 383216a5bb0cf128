"""Clover's drafter: every node of a tree is drafted from its parent's state, updated with its token.

Source: Xiao et al. 2024, arXiv:2405.00263 and arXiv:2408.00264.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.clover import Clover
from hasten.accel.training.heads.draft_head import DraftHead


@dataclass(frozen=True)
class CloverDrafter(HeadDrafter):
    """Drafter with a Clover head."""

    name: ClassVar[str] = "clover"
    head_type: ClassVar[type[DraftHead]] = Clover
