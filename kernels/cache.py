"""The cache folder, for files that can be built or downloaded again."""

import os
from pathlib import Path


def default_cache() -> Path:
    """$HASTEN_CACHE, else `hasten` in the user's cache folder."""
    cache = os.environ.get("HASTEN_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hasten")
