"""The reduced vocabulary that a head drafts from: the most frequent tokens of its training text.

Source: Zhao et al. 2025, arXiv:2502.14856 (FR-Spec); Li et al. 2025, arXiv:2503.01840 (EAGLE-3), whose d2t it
writes. The output layer is the largest part of a head, and most of a vocabulary is never drafted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.errors import UserError


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """ids: (R,) int64 in ascending order, the target's id of each row of the draft's output. size: V of the target."""

    ids: Tensor
    size: int

    def __post_init__(self) -> None:
        rows = torch.full((self.size,), -1, dtype=torch.long, device=self.ids.device)
        rows[self.ids] = torch.arange(len(self.ids), device=self.ids.device)
        object.__setattr__(self, "_rows", rows)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def full(cls, size: int) -> "DraftVocabulary":
        """All ids of the target."""
        return cls(torch.arange(size), size)

    @classmethod
    def most_frequent(cls, counts: Tensor, entries: int) -> "DraftVocabulary":
        """The `entries` most frequent ids of counts (V,); of equal counts the smaller id. 0 takes all ids."""
        if entries < 0:
            raise UserError(f"draft_vocabulary={entries} is wrong: expected 0 (all ids) or a number of ids")
        if entries in (0, len(counts)) or entries > len(counts):
            return cls.full(len(counts))
        order = counts.argsort(descending=True, stable=True)[:entries]
        return cls(order.sort().values, len(counts))

    def rows_of(self, ids: Tensor) -> Tensor:
        """The draft's row of each of the target's ids, any shape, int64; -1 where the draft lacks it."""
        rows: Tensor = self._rows  # type: ignore[attr-defined]
        return rows.to(ids.device)[ids]

    def to(self, device: torch.device | str) -> "DraftVocabulary":
        """The vocabulary on a device."""
        return DraftVocabulary(self.ids.to(device), self.size)

    @property
    def d2t(self) -> Tensor:
        """EAGLE-3's map from rows to ids, (R,) int64: what is added to a row's number to get the id."""
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)
