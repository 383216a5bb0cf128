"""Leaves processes out when Ray starts on this machine.

Left out are the monitor of autoscalers, the log monitor (drivers do not print what workers print), the API server, and
the agent of the dashboard, in whose place idle_agent.py runs. They take about 6 CPU seconds at Ray's start and 270 MB,
and the log monitor more with every file of logs. Ray has no options for that: functions of its own are replaced while
it starts.
"""

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)
SWITCH = "HASTEN_RAY_PROCESSES"
_AGENT = "--dashboard_agent_command="
_FOLDER, _NODE = "--session_dir=", "--node_id="
_IDLE = Path(__file__).with_name("idle_agent.py")
# Ray's names of the ports that the agent would listen on.
_PORTS = ("METRICS_AGENT_PORT_NAME", "METRICS_EXPORT_PORT_NAME", "DASHBOARD_AGENT_LISTEN_PORT_NAME")


@contextmanager
def fewer_processes() -> Iterator[None]:
    """Context in which Ray starts on this machine without processes that hasten does not use.

    With HASTEN_RAY_PROCESSES=all, and with a Ray that has other functions than those known here, it starts all.
    """
    with ExitStack() as stack:
        if os.environ.get(SWITCH) != "all":
            for module, name, replacement in _replacements():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, replacement)
        yield


def _replacements() -> list[tuple[Any, str, Any]]:
    """Modules of Ray, names in them, and what takes their place."""
    from ray._private import parameter, services

    try:
        parameters = inspect.signature(parameter.RayParams).parameters
        start = services.start_ray_process
        known = {"no_monitor", "include_log_monitor"} <= parameters.keys() and callable(services.start_api_server)
        known = known and all(hasattr(_ports(), name) for name in ("persist_port", *_PORTS))
        known = known and list(inspect.signature(start).parameters)[:2] == ["command", "process_type"]
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        _LOG.debug("this Ray starts its processes in another way: all of them are started")
        return []

    @wraps(start)
    def start_ray_process(command: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return start(_with_idle_agent(list(command)), *args, **kwargs)

    absent: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    fewer = partial(parameter.RayParams, **absent)
    return [
        (parameter, "RayParams", fewer),
        # As if it had not started, which Ray lives with.
        (services, "start_api_server", lambda *_args, **_kwargs: (None, None)),
        (services, "start_ray_process", start_ray_process),
    ]


def _with_idle_agent(command: list[str]) -> list[str]:
    """The command, if it is that of the process that starts the agent, with another agent."""
    folder, node = (
        next((word.removeprefix(option) for word in command if word.startswith(option)), None)
        for option in (_FOLDER, _NODE)
    )
    if folder is None or node is None or not any(word.startswith(_AGENT) for word in command):
        return command
    ports = _ports()
    # Ray waits for the agent's ports; -1 says that there are none.
    for name in _PORTS:
        ports.persist_port(folder, node, getattr(ports, name), -1)
    # Neither site packages nor Python's variables: it must start at once and stay small.
    agent = _AGENT + subprocess.list2cmdline([sys.executable, "-S", "-E", str(_IDLE)])
    return [agent if word.startswith(_AGENT) else word for word in command]


def _ports() -> Any:
    """Ray's module that keeps a node's ports; mypy does not see what is compiled."""
    return import_module("ray._raylet")
