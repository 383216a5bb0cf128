"""A progress bar with the remaining time; log lines if standard error is not a terminal."""

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Progress of work in `total` steps, a context while the work runs."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._done = 0
        self._bar: tqdm[NoReturn] | None = None
        self._started = self._last_line = time.monotonic()
        self._first = 0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self.title, total=self.total, unit=self.unit, file=sys.stderr, dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, done: int) -> None:
        """Count steps of an earlier run, which the estimate of the remaining time ignores."""
        self._done = self._first = done
        if self._bar is not None:
            self._bar.n = self._bar.initial = done
            self._bar.refresh()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are done in total, with an optional note."""
        self._done = done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or done == self.total:
            self._last_line = now
            _LOG.info(
                "%s: %d of %d %ss%s%s", self.title, done, self.total, self.unit, self._left(now), note and f", {note}"
            )

    def _left(self, now: float) -> str:
        fresh = self._done - self._first
        if not fresh or self._done >= self.total:
            return ""
        seconds = (now - self._started) / fresh * (self.total - self._done)
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"
