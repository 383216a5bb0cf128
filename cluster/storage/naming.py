"""Replaces the paths of local copies by the URIs that the user gave, in everything that a run writes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# URI by local path. Global to the process and not to a thread, because other threads write for the run, too.
_GIVEN: dict[str, str] = {}


@contextmanager
def called(names: Mapping[Path, str]) -> Iterator[None]:
    """Context in which `as_given` replaces these absolute local paths by their URIs."""
    before = dict(_GIVEN)
    _GIVEN.update({str(path): uri.rstrip("/") for path, uri in names.items()})
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def as_given(value: Any) -> Any:
    """The value with URIs in place of the paths of local copies in its strings; goes into mappings and lists."""
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
            # Matches neither the end of a longer path or URI nor the beginning of a longer name.
            text = re.sub(rf"(?<![\w./~-]){re.escape(path)}(?=/|$|[^\w.-]|\.$|\. )", uri.replace("\\", "\\\\"), text)
    return text if isinstance(value, str) or text != str(value) else value
