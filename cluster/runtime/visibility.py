"""Whether every node of a cluster sees the files that a job's actors read and write; looked up before they start."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hasten.accel.errors import UserError

_SECONDS_TO_ANSWER = 60.0
# A network folder may show a file that another machine has just written only a little later.
_SECONDS_TO_APPEAR = 10.0
_SECONDS_BETWEEN_LOOKS = 0.25
_UNFINISHED = (".tmp", ".part", ".lock")
_MARKER = ".hasten-"

# Size of a file; of a folder the sizes of the files in it by name; None where there is nothing.
State = int | dict[str, int] | None
Look = Callable[[Mapping[str, State]], list[str]]


def check(reads: Mapping[str, Path], writes: Mapping[str, Path]) -> None:
    """UserError that names a path, and a node whose actors would not see it as this process does.

    Runs inside a Ray session; with no node but this process's own there is nothing to look up. reads, writes: by the
    options that they come from, what is read and is there, and what is written and may be there. Writing is tried with
    an empty file in the nearest folder that is there, which is removed again.
    """
    _check(reads, writes, unseen)


def _check(reads: Mapping[str, Path], writes: Mapping[str, Path], look: Look) -> None:
    nodes = _other_nodes()
    if not nodes:
        return
    with contextlib.ExitStack() as stack:
        named = {str(path.absolute()): (option, path) for option, path in reads.items()}
        states = {text: state(Path(text)) for text in named}
        for option, path in writes.items():
            marker = _marker(option, path)
            stack.callback(marker.unlink, missing_ok=True)
            named[str(marker)] = (option, path)
            states[str(marker)] = 0
        for node, missing in _answers(nodes, states, look).items():
            if missing:
                option, path = named[missing[0]]
                raise UserError(
                    f"{option}={path} is not the same on node {node}, whose actors need it: give a folder that all "
                    "nodes share, or a URI such as s3://BUCKET/NAME with cache=FOLDER on such a folder"
                )


def state(path: Path) -> State:
    """What is at a path, to be compared between machines."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as entries:
            return {
                entry.name: entry.stat().st_size
                for entry in entries
                if entry.is_file() and not entry.name.endswith(_UNFINISHED) and not entry.name.startswith(_MARKER)
            }
    except OSError:
        return None


def unseen(expected: Mapping[str, State]) -> list[str]:
    """Paths that are not as expected on this machine, after a short time in which they may appear."""
    end = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        missing = [path for path, found in expected.items() if state(Path(path)) != found]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _marker(option: str, path: Path) -> Path:
    """A new empty file where `path` is or will be."""
    here = path.absolute()
    while not here.is_dir() and here != here.parent:
        here = here.parent
    marker = here / f"{_MARKER}{uuid.uuid4().hex}"
    try:
        marker.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"{option}={path} cannot be written to ({error.strerror} in {here})") from None
    return marker


def _other_nodes() -> dict[str, str]:
    """Name and address of the nodes, by their ids, that may get actors and are not this process's own."""
    # Through Ray's client the process is on none of the nodes.
    own = None if ray.util.client.ray.is_connected() else ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


def _answers(nodes: Mapping[str, str], states: Mapping[str, State], look: Look) -> dict[str, list[str]]:
    """What look(states) returns on each of the nodes, by their names."""
    task: Any = ray.remote(num_cpus=0, max_retries=1)(look)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(dict(states))
        for node in nodes
    }
    end = time.monotonic() + _SECONDS_TO_ANSWER
    found = {}
    for node, answer in asked.items():
        try:
            found[nodes[node]] = ray.get(answer, timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"node {nodes[node]} did not say within {_SECONDS_TO_ANSWER:.0f} s whether it sees the files: look "
                "whether it is overloaded, or take it out of the cluster"
            ) from None
        except ray.exceptions.RayError as error:
            if any(each["NodeID"] == node and each["Alive"] for each in ray.nodes()):
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"node {nodes[node]} cannot run hasten ({reason}): install it there as here") from None
            # It died meanwhile, and gets no actors.
    return found
