"""A folder full of modules that must not be imported: of every package, of Python, and of hasten's folders."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

FOLDERS = ("accel", "cluster", "conf", "hasten", "jobs", "kernels")
_TRAP = """
from io import open
open({mark!r}, "a").write(__name__ + "\\n")
raise RuntimeError(__name__ + " was imported from the current folder")
"""
_MARK = "imported"


def set_traps(folder: Path, start: str = "script") -> None:
    """Make the modules in a folder. start: `module` leaves out what Python itself imports before any of our code."""
    text = _TRAP.format(mark=str(folder / _MARK))
    # `io` is there before any path is searched.
    names = {*packages_distributions(), *sys.stdlib_module_names, *FOLDERS} - {"io"}
    if start == "module":
        at_start = subprocess.run(
            [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
        )
        names -= {*sys.stdlib_module_names, *at_start.stdout.split(), "hasten"}
    for name in filter(str.isidentifier, names):
        if name in FOLDERS:
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(text)
        else:
            (folder / f"{name}.py").write_text(text)


def imported(folder: Path) -> list[str]:
    """Names of the modules in the folder that some process has imported."""
    mark = folder / _MARK
    return mark.read_text().split() if mark.exists() else []
