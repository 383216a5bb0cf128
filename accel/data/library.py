"""Text that every machine with Python has: the source files of the standard library.

The held-out split consists of whole files, chosen by a hash of their path below the library's root. So the split is
the same on every machine and in every Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 20
SPLITS = ("train", "held_out")
# Installed packages are not part of the standard library, and byte code is not text.
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
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and path.is_file():
            names.append(relative.as_posix())
    return sorted(name for name in names if is_held_out(name) == (split == "held_out"))


def read_texts(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Contents of files below root. Empty files, and files that are not UTF-8 (a few test fixtures), are skipped."""
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text
