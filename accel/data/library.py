"""Text that every machine with Python has: the standard library's own source files.

Whole files are held out, chosen by a hash of their path below the library's root, so that the split
is the same on every machine and in every Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 20
SPLITS = ("train", "held_out")
# Installed packages are no part of the library, and byte code is no text.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "config", "lib-dynload"}


def library_root() -> Path:
    """Folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative: str) -> bool:
    """Whether the file at this path below the library's root (with forward slashes) is held out."""
    digest = hashlib.sha256(relative.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def library_files(split: str, root: Path | None = None) -> list[str]:
    """Paths of one split's files below root, in the order of their names."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
    root = root or library_root()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and path.is_file():
            found.append(relative.as_posix())
    return sorted(name for name in found if is_held_out(name) == (split == "held_out"))


def read_texts(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Contents of files below root; those that are not UTF-8 (a few test fixtures) and empty ones are left out."""
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text
