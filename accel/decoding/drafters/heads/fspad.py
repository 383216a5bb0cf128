"""FSPAD's drafter: EAGLE's, with a head that samples features.

Source: Gui et al. 2024, arXiv:2408.15562.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.fspad import Fspad


@dataclass(frozen=True)
class FspadDrafter(HeadDrafter):
    """Drafter with FSPAD's head."""

    name: ClassVar[str] = "fspad"
    head_type: ClassVar[type[DraftHead]] = Fspad
