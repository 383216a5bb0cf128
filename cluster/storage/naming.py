"""What users called the files that a run works on: URIs in place of local copies, in all that the run writes down."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of this process, not of a thread: what a run writes down is in part written by others than its own.
_GIVEN: dict[str, str] = {}


@contextmanager
def called(names: Mapping[Path, str]) -> Iterator[None]:
    """For the time of the block `as_given` knows these absolute local paths by the URIs that stand for them."""
    before = dict(_GIVEN)
    _GIVEN.update({str(path): uri.rstrip("/") for path, uri in names.items()})
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def as_given(value: Any) -> Any:
    """The value with URIs where texts in it name local copies of what lies there; mappings and lists item by item."""
    if not _GIVEN:
        return value
    if isinstance(value, Mapping):
        return {name: as_given(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_given(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    for path, uri in _GIVEN.items():
        if path in text:
            # Neither the end of a longer path, which a URI is too, nor the beginning of another name.
            text = re.sub(rf"(?<![\w./~-]){re.escape(path)}(?=/|$|[^\w.-]|\.$|\. )", uri.replace("\\", "\\\\"), text)
    return text if isinstance(value, str) or text != str(value) else value
