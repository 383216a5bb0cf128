"""Hydra++'s drafter: Hydra's, on the output of a decoder layer over the committed tokens.

Source: Ankner et al. 2024, arXiv:2402.05109.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.hydra_pp import HydraPP


@dataclass(frozen=True)
class HydraPPDrafter(HeadDrafter):
    """Drafter with Hydra++'s heads."""

    name: ClassVar[str] = "hydra_pp"
    head_type: ClassVar[type[DraftHead]] = HydraPP
