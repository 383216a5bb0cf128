"""DFlash's drafter: one pass over a block of masks drafts all depths.

Source: Chen et al. 2026, arXiv:2602.06036.
Departs from it: there the draft is a chain of most probable tokens; here branches are drafted as well, with width=1 and
branches=1 it is the chain.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.dflash import DFlash
from hasten.accel.training.heads.draft_head import DraftHead


@dataclass(frozen=True)
class DFlashDrafter(HeadDrafter):
    """Drafter with DFlash's block."""

    name: ClassVar[str] = "dflash"
    head_type: ClassVar[type[DraftHead]] = DFlash
