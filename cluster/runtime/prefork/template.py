"""The template process of a Ray: imports what workers import, and forks one for each request of start_worker.py.

Run by path, with the listening socket's number and the job's import path as JSON. It has one thread, as a fork needs,
computes nothing, and ends with the process that started it.
"""

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

# What has nothing to do with Ray is imported at once, some of it for being imported by others when they are first used.
_MODULES = ("torch._dynamo", "transformers.models.llama.modeling_llama", "hasten.accel.models.checkpoint")
# The rest has to wait: Ray reads its variables when it is imported, and the first worker brings them.
_PACKAGES = ("hasten.cluster.actors", "hasten.cluster.programs")
_RAY_MODULES = ("ray._private.workers.default_worker",)
_CHECK_SECONDS = 1.0
# Of glibc's variables, which it reads when a program starts: the parameters of mallopt that they set.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
# Variable with the process whose end a worker must not outlive, the scheduler of its node. Ray reads it when it is
# imported, for all workers that are forked afterwards.
_SCHEDULER = "RAY_RAYLET_PID"
# Variables that are read after the fork, or that the child applies.
_RAY = "RAY_"
_LATE = {"OMP_NUM_THREADS", *_MALLOC}


def main() -> None:
    """Serve until the parent ends. In a forked process: run the worker."""
    listening, parent = socket.socket(fileno=int(sys.argv[1])), os.getppid()
    sys.path[:] = json.loads(sys.argv[2])
    started = dict(os.environ)
    _import(_MODULES)
    arguments = _serve(listening, parent, started)
    if arguments:
        sys.argv = arguments
        if not sys.flags.safe_path:
            sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def import_all(variables: dict[str, str]) -> None:
    """Import what a worker with these variables of Ray's has imported."""
    _import(_MODULES)
    _import_for(variables)


def _import_for(variables: dict[str, str]) -> None:
    """Import what reads Ray's variables, which are those of the first worker."""
    os.environ.update({name: value for name, value in variables.items() if name.startswith(_RAY)})
    _import(_RAY_MODULES)
    for package in _PACKAGES:
        found = pkgutil.iter_modules(importlib.import_module(package).__path__)
        _import([f"{package}.{module.name}" for module in found])


def _import(names: Iterable[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            # A worker that needs the module says what is wrong.
            print(f"{name} is not imported: {error}", file=sys.stderr)


def _serve(listening: socket.socket, parent: int, started: dict[str, str]) -> list[str]:
    """Arguments of the worker, in each forked process; none in this one, after the parent's end."""
    # Nobody waits for the workers: Ray knows them by their connections.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening.settimeout(_CHECK_SECONDS)
    is_first, known = True, ""
    while True:
        try:
            line, _ = listening.accept()
        except TimeoutError:
            if os.getppid() != parent:
                return []
            continue
        with line:
            try:
                request, files = _received(line)
            except (OSError, ValueError):
                continue
            if is_first:
                _import_for(request["variables"])
                is_first, known = False, request["variables"].get(_SCHEDULER, "")
                # Collections of garbage would copy shared pages.
                gc.collect()
                gc.freeze()
            fits = _same(started, request["variables"]) and len(os.listdir("/proc/self/task")) == 1
            if fits and os.fork() == 0:
                listening.close()
                _become(request, files, started)
                scheduler = request["variables"].get(_SCHEDULER, "")
                if scheduler != known and scheduler.isdigit():
                    _end_with(int(scheduler))
                line.sendall(b"y")
                arguments: list[str] = request["arguments"]
                return arguments
            for file in files:
                os.close(file)
            if not fits:
                with suppress(OSError):
                    line.sendall(b"n")


def _received(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    line.settimeout(10)
    size, files, _, _ = socket.recv_fds(line, 4, 3)
    left, parts = int.from_bytes(size, "big"), []
    while left:
        part = line.recv(min(left, 1 << 16))
        if not part:
            raise OSError("the request ends early")
        parts.append(part)
        left -= len(part)
    request: dict[str, Any] = json.loads(b"".join(parts))
    return request, files


def _same(started: dict[str, str], variables: dict[str, str]) -> bool:
    """Whether modules that are imported already would have read the same variables."""
    return all(
        started.get(name) == variables.get(name)
        for name in started.keys() | variables.keys()
        if name not in _LATE and not name.startswith(_RAY)
    )


def _become(request: dict[str, Any], files: list[int], started: dict[str, str]) -> None:
    """Take over a worker's files, folder, environment, number of threads, and how memory is given back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The group in which Ray has started the worker, and by which it ends what the worker leaves.
    os.setpgid(0, request["group"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    # Some modules set variables when they are imported.
    by_imports = {
        name: value for name, value in os.environ.items() if started.get(name) != value and not name.startswith(_RAY)
    }
    os.environ.clear()
    os.environ.update(by_imports | request["variables"])
    threads = request["variables"].get("OMP_NUM_THREADS", "")
    if threads.isdigit() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(max(1, int(threads)))
    for name, parameter in _MALLOC.items():
        value = request["variables"].get(name, "")
        if value.isdigit():
            ctypes.CDLL(None).mallopt(parameter, int(value))


def _end_with(process: int) -> None:
    """End this process when another one ends."""

    def wait() -> None:
        try:
            ended = select.poll()
            ended.register(os.pidfd_open(process), select.POLLIN)
            ended.poll()
        except ProcessLookupError:
            pass
        except OSError:
            # A kernel without such files, or none left.
            while os.path.exists(f"/proc/{process}"):
                time.sleep(_CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
