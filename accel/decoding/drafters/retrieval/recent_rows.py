"""Shared by drafters whose table grows while decoding: a table of bounded size that knows which rows have changed."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row")


class RecentRows(OrderedDict[Key, Row]):
    """Rows by their keys, in the order of their latest update."""

    # Keys of the rows that were put since the last call of `changes`; None before the first.
    _changed: set[Key] | None = None

    def put(self, key: Key, row: Row, max_rows: int) -> None:
        """Set a row, as the latest one; of more than max_rows rows the least recently updated one is dropped."""
        self[key] = row
        self.move_to_end(key)
        if self._changed is not None:
            self._changed.add(key)
        if len(self) > max_rows:
            oldest, _ = self.popitem(last=False)
            if self._changed is not None:
                self._changed.discard(oldest)

    def changes(self, whole: bool) -> Mapping[Key, Row]:
        """Rows that were put since the last call, in the order of their update; all at the first, or with `whole`."""
        changed, self._changed = self._changed, set()
        if whole or changed is None:
            return self
        # An update moves a row to the end.
        latest = list(islice(reversed(self), len(changed)))[::-1]
        return {key: self[key] for key in latest}
