"""What Ray runs in place of its setup_worker.py: has a worker forked from the template process of this Ray.

Run by path, not as a module: it must start fast, and imports nothing but the standard library. Whatever does not work
out, and workers with an environment of their own, are started as Ray does.

Usage: start_worker.py [-S] [-s] DEFAULT_WORKER OPTION... --serialized-runtime-env-context=JSON --language=PYTHON
"""

import json
import os
import socket
import sys
from pathlib import Path

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_SOCKET = "RAY_HASTEN_FORK_SOCKET"
# Of Ray's description of an environment, what does not stand in the way of a fork.
_PLAIN = {"env_vars", "py_executable"}
# Less than Ray waits for a worker.
_ANSWER_SECONDS = 40.0


def main() -> None:
    """Exit after the fork, or become the worker's ordinary start."""
    arguments = sys.argv[1:]
    try:
        forked = _forked(arguments)
    except (OSError, ValueError, KeyError):
        forked = False
    if not forked:
        worker = next(Path(argument) for argument in arguments if argument.endswith(".py"))
        os.execv(sys.executable, [sys.executable, str(worker.with_name("setup_worker.py")), *arguments])


def _forked(arguments: list[str]) -> bool:
    """Whether the template process has forked the worker."""
    given, language = _value(arguments, _CONTEXT), _value(arguments, _LANGUAGE)
    rest = [argument for argument in arguments if not argument.startswith((_CONTEXT, _LANGUAGE))]
    context = json.loads(given or "{}")
    if language not in ("PYTHON", None) or not rest[0].endswith(".py"):
        return False
    if any(value for key, value in context.items() if key not in _PLAIN):
        return False
    if context.get("py_executable") not in (None, sys.executable):
        return False
    variables = {**os.environ, **(context.get("env_vars") or {})}
    facts = {"arguments": rest, "variables": variables, "folder": os.getcwd(), "group": os.getpgrp()}
    request = json.dumps(facts).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_ANSWER_SECONDS)
        line.connect(os.environ[_SOCKET])
        socket.send_fds(line, [len(request).to_bytes(4, "big")], [0, 1, 2])
        line.sendall(request)
        # Until then this process keeps the process group, by which Ray ends a worker's processes, there for the worker.
        return line.recv(1) == b"y"


def _value(arguments: list[str], name: str) -> str | None:
    return next((argument[len(name) :] for argument in arguments if argument.startswith(name)), None)


if __name__ == "__main__":
    main()
