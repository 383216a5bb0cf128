"""PPD's drafter: trained prompt tokens behind the nodes of the target's pass predict the tokens after the next one.

Source: Chen et al. 2024, arXiv:2405.18628.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.virtual import VirtualDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.ppd import ParallelPrompts


@dataclass(frozen=True)
class PpdDrafter(VirtualDrafter):
    """Drafter with prompt tokens."""

    name: ClassVar[str] = "ppd"
    head_type: ClassVar[type[DraftHead]] = ParallelPrompts
