"""Chimera's drafter: every node of a tree is drafted from the context, its path and its last three tokens.

Source: Zeng et al. 2024, arXiv:2402.15758.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.chimera import Chimera
from hasten.accel.training.heads.draft_head import DraftHead


@dataclass(frozen=True)
class ChimeraDrafter(HeadDrafter):
    """Drafter with a Chimera head."""

    name: ClassVar[str] = "chimera"
    head_type: ClassVar[type[DraftHead]] = Chimera
