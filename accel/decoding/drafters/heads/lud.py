"""LUD's drafter: pads behind the last token draft all depths in one pass of the head.

Source: Sun et al. 2024, arXiv:2405.15208.
Departs from it: the drafts are a tree, and verified like any other; verifier=lexical_unit accepts confident ones
unverified, as LUD does, which is not lossless.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.lud import Lud


@dataclass(frozen=True)
class LudDrafter(HeadDrafter):
    """Drafter with LUD's pads."""

    name: ClassVar[str] = "lud"
    head_type: ClassVar[type[DraftHead]] = Lud
