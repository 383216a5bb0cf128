"""Medusa's drafter: every depth is drafted from the same hidden state, whatever was drafted before.

Source: Cai et al. 2024, arXiv:2401.10774.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.medusa import Medusa


@dataclass(frozen=True)
class MedusaDrafter(HeadDrafter):
    """Drafter with Medusa's heads."""

    name: ClassVar[str] = "medusa"
    head_type: ClassVar[type[DraftHead]] = Medusa
