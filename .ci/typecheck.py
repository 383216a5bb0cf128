"""mypy over the packages by the names that they are installed under, which no folder of a checkout spells."""

import sys
from pathlib import Path

from mypy import build
from mypy.main import process_options
from mypy.modulefinder import BuildSource

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("accel", "kernels", "cluster", "jobs", "conf")


def sources() -> list[BuildSource]:
    """Every module below the top folders, as `hasten.FOLDER.MODULE`."""
    found = [BuildSource("hasten/__init__.py", "hasten")]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).with_suffix("")
            parts = name.parts[:-1] if name.name == "__init__" else name.parts
            found.append(BuildSource(str(path.relative_to(ROOT)), ".".join(("hasten", *parts))))
    return found


def main() -> int:
    """Exit code: 1 where there are errors, which are printed."""
    _, options = process_options(["-c", ""])
    try:
        errors = build.build(sources(), options).errors
    except build.CompileError as error:
        errors = error.messages
    print("\n".join([*errors, f"{len(errors)} lines of errors" if errors else "no type errors"]))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
