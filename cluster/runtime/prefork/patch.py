"""Starts the template process, and lets Ray start workers by start_worker.py.

Ray has no option for the latter: one argument of its own function is replaced.
"""

import inspect
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from hasten.cluster.runtime.session_folders import short_folder

_LOG = logging.getLogger(__name__)
SWITCH = "HASTEN_PREFORK"
# The template process's socket, for start_worker.py; a name that Ray hands on to workers as its own.
SOCKET = "RAY_HASTEN_FORK_SOCKET"
# Variables that Ray sets for its workers.
_OF_RAY = {"SPT_NOENV": "1"}
_FOLDER = Path(__file__).parent
_GPUS = ("/proc/driver/nvidia", "/dev/kfd")


def can_fork() -> bool:
    """Whether a Ray that is started on this machine forks its workers."""
    return sys.platform == "linux" and os.environ.get(SWITCH) != "0" and not any(map(os.path.exists, _GPUS))


@contextmanager
def forked_workers() -> Iterator[None]:
    """Context in which a Ray that is started on this machine forks its workers, if it can.

    It does so on Linux without GPUs, whose drivers do not survive a fork once they are in use; and not with
    HASTEN_PREFORK=0.
    """
    services, folder = _services(), short_folder()
    if services is None or folder is None:
        yield
        return
    original = services.start_raylet
    signature = inspect.signature(original)

    @wraps(original)
    def start_raylet(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["setup_worker_path"] = str(_FOLDER / "start_worker.py")
        return original(*bound.args, **bound.kwargs)

    with tempfile.TemporaryDirectory(prefix="hasten-", dir=folder, ignore_cleanup_errors=True) as own:
        path = str(Path(own, "fork"))
        template = _template(path)
        services.start_raylet = start_raylet
        os.environ[SOCKET] = path
        try:
            yield
        finally:
            os.environ.pop(SOCKET, None)
            services.start_raylet = original
            template.terminate()
            template.wait()


def _template(path: str) -> "subprocess.Popen[bytes]":
    """The template process. Its socket listens already, so that requests wait for its imports."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(256)
        # The same hasten as this process, wherever that was imported from.
        import_path = json.dumps([entry for entry in sys.path if entry])
        return subprocess.Popen(
            [sys.executable, str(_FOLDER / "template.py"), str(listening.fileno()), import_path],
            env={**os.environ, **_OF_RAY},
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A terminal's Ctrl-C is for the job alone. Not a session of its own: workers join groups of this one.
            process_group=0,
        )


def _services() -> Any:
    """Ray's module that starts its processes; None where workers are not forked."""
    if not can_fork():
        return None
    from ray._private import services

    try:
        known = "setup_worker_path" in inspect.signature(services.start_raylet).parameters
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        _LOG.debug("this Ray has no start_raylet(setup_worker_path): its workers are not forked")
        return None
    return services
