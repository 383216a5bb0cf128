"""Where this machine keeps what can be made or fetched again."""

import os
from pathlib import Path


def default_cache() -> Path:
    """HASTEN_CACHE, or hasten in the user's cache folder."""
    named = os.environ.get("HASTEN_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hasten")
