"""Keeps the current folder off the import path: a user's `torch.py` or `jobs/` beside the data is not hasten's to run.

Imports only what Python itself has imported at its start.
"""

import os
import sys

# The folder that holds `hasten`: site-packages, or the top of a checkout.
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_VARIABLE = "PYTHONPATH"


def leave_out_current_folder() -> None:
    """Remove the current folder from the import path of this process and of the Python processes that it starts.

    Python puts it there for `python -m`, and for empty or relative entries of PYTHONPATH. It stays if it is the folder
    that holds hasten, or is an absolute path in PYTHONPATH.
    """
    try:
        current = os.getcwd()
    except FileNotFoundError:  # the folder was deleted
        current = ""
    given = os.environ.get(_VARIABLE)
    entries = given.split(os.pathsep) if given else []
    kept = [path for entry in entries if (path := _absolute(entry, current))]
    if current == ROOT:
        # Child processes, which may have other current folders, import the same hasten.
        kept = kept if ROOT in kept else [ROOT, *kept]
    else:
        if not sys.flags.safe_path and sys.path[:1] in ([""], [current]):
            del sys.path[0]
        if len(kept) < len(entries) and current in sys.path and current not in kept:
            sys.path.remove(current)
    os.environ["PYTHONSAFEPATH"] = "1"
    if kept:
        os.environ[_VARIABLE] = os.pathsep.join(kept)
    else:
        os.environ.pop(_VARIABLE, None)


def _absolute(entry: str, current: str) -> str | None:
    """Absolute path of an entry of PYTHONPATH; None for an empty or relative one that is the current folder."""
    if os.path.isabs(entry):
        return entry
    path = os.path.normpath(os.path.join(current, entry))
    return path if os.path.isabs(path) and path != current else None
