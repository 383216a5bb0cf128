"""Hydra's drafter: every node is drafted from the target's hidden state and the embeddings of its path.

Source: Ankner et al. 2024, arXiv:2402.05109.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.hydra import Hydra


@dataclass(frozen=True)
class HydraDrafter(HeadDrafter):
    """Drafter with Hydra's heads."""

    name: ClassVar[str] = "hydra"
    head_type: ClassVar[type[DraftHead]] = Hydra
