"""The interface of layouts: how other programs store a trained head in a folder."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, TargetFacts


class Layout(ABC):
    """A layout of one kind of heads; a frozen dataclass of what a folder says besides the head."""

    name: ClassVar[str]
    head_type: ClassVar[type[DraftHead]]

    @abstractmethod
    def matches(self, folder: Path) -> bool:
        """Whether a folder is of this layout, by its config; what the layout cannot express is found by `read`."""

    @abstractmethod
    def write(self, network: DraftNetwork, head: DraftHead, folder: Path, facts: TargetFacts) -> None:
        """Write the folder, config last; UserError with the option of the head that the layout cannot express.

        facts: of the target that the head was trained for.
        """

    @abstractmethod
    def read(self, folder: Path, facts: TargetFacts) -> tuple[DraftHead, DraftNetwork]:
        """Head and network in float32; UserError with the setting that our head lacks, or if made for another target.

        facts: of the target that it will be used with.
        """
