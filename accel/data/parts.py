"""The division of a text into parts for calibration, search and evaluation that share no token.

A text is cut into sections, and every part gets a range of each section: so each part covers the whole of a text whose
content changes from its beginning to its end. Within a section calibration comes first, then search, then evaluation,
in tenths. The division depends on the size of the text and on how much the calibration needs, never on a seed.
"""

import itertools
from dataclasses import dataclass

ROLES = ("calibration", "search", "evaluation")
TENTHS = 10
# Tenths of a text, about as the defaults of the jobs need them: 64K, 32K and 16K tokens.
_CALIBRATION, _SEARCH = 5, 8
# More sections make the parts no more diverse.
_MAX_SECTIONS = 64


@dataclass(frozen=True)
class Part:
    """Part of a text. role: what for, one of ROLES. calibration: tenths of the text that the calibration takes.

    The calibration takes more than half only where it needs more; the other parts then have less, or nothing.
    """

    role: str
    calibration: int = _CALIBRATION

    def __post_init__(self) -> None:
        if self.role not in ROLES or not _CALIBRATION <= self.calibration <= TENTHS:
            raise ValueError(f"need a role of {ROLES} and {_CALIBRATION} to {TENTHS} tenths, got {self}")

    @property
    def tenths(self) -> tuple[int, int]:
        """First tenth of each section, and the first behind the part."""
        if self.role == "calibration":
            return 0, self.calibration
        if self.role == "search":
            return self.calibration, max(_SEARCH, self.calibration)
        return max(_SEARCH, self.calibration), TENTHS

    def ranges(self, size: int, section: int) -> list[tuple[int, int]]:
        """Ranges [first, stop) of a text of `size` bytes, tokens or rows; the text has sections of at least `section`.

        Ranges of different roles are disjoint; empty ones are left out.
        """
        sections = max(1, min(_MAX_SECTIONS, size // section))
        borders = [size * number // sections for number in range(sections + 1)]
        low, high = self.tenths
        spans = [
            (first + (stop - first) * low // TENTHS, first + (stop - first) * high // TENTHS)
            for first, stop in itertools.pairwise(borders)
        ]
        return [(first, stop) for first, stop in spans if first < stop]

    def holds(self, index: int) -> bool:
        """Whether the document of this index belongs to the part, for a stream of documents of unknown number."""
        low, high = self.tenths
        return low <= index % TENTHS < high


def larger_calibrations() -> list[int]:
    """Tenths that a calibration may take, fewest first."""
    return list(range(_CALIBRATION, TENTHS + 1))
