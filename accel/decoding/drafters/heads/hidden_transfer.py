"""Hidden transfer's drafter: pseudo states of the tokens to come enter the target's pass in its middle.

Source: Wu et al. 2024, arXiv:2404.12022.
"""

from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.heads.virtual import VirtualDrafter
from hasten.accel.training.heads.draft_head import DraftHead
from hasten.accel.training.heads.hidden_transfer import HiddenTransfer


@dataclass(frozen=True)
class HiddenTransferDrafter(VirtualDrafter):
    """Drafter with pseudo states."""

    name: ClassVar[str] = "hidden_transfer"
    head_type: ClassVar[type[DraftHead]] = HiddenTransfer
