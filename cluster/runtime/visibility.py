"""Checks, before a job's actors start, that all nodes of a cluster see the files that the actors read and write."""

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
# A network folder may show a file with a delay after another machine has written it.
_SECONDS_TO_APPEAR = 10.0
_POLL_SECONDS = 0.25
_UNFINISHED = (".tmp", ".part", ".lock")
_MARKER = ".hasten-"

# What is at a path: the size of a file, the sizes by name of the files in a folder, or None for nothing.
State = int | dict[str, int] | None
Probe = Callable[[Mapping[str, State]], list[str]]


def check(reads: Mapping[str, Path], writes: Mapping[str, Path]) -> None:
    """Raise UserError naming a path, and a node on which the path is not the same as for this process.

    Runs inside a Ray session; without other nodes nothing is checked. reads: paths that exist, by option. writes: paths
    that may not exist yet, by option; they are checked with an empty file in the nearest existing folder, which is
    removed again.
    """
    _check(reads, writes, unseen)


def _check(reads: Mapping[str, Path], writes: Mapping[str, Path], probe: Probe) -> None:
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
        for node, missing in _answers(nodes, states, probe).items():
            if missing:
                option, path = named[missing[0]]
                raise UserError(
                    f"{option}={path} is not the same on node {node}, whose actors need it: give a path on a file "
                    "system that all nodes share, or a URI such as s3://BUCKET/NAME with a shared cache=FOLDER"
                )


def state(path: Path) -> State:
    """State of a path, to be compared between machines."""
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
    """Paths whose state on this machine is not the expected one, after waiting a short time for them."""
    end = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        missing = [path for path, expected_state in expected.items() if state(Path(path)) != expected_state]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(_POLL_SECONDS)


def _marker(option: str, path: Path) -> Path:
    """Create an empty file in the nearest existing folder of `path`; returns its path."""
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    marker = folder / f"{_MARKER}{uuid.uuid4().hex}"
    try:
        marker.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"{option}={path} cannot be written to ({error.strerror} in {folder})") from None
    return marker


def _other_nodes() -> dict[str, str]:
    """Name and address, by id, of the nodes that may get actors, without this process's own."""
    # With Ray's client, this process is on none of the nodes.
    own = None if ray.util.client.ray.is_connected() else ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


def _answers(nodes: Mapping[str, str], states: Mapping[str, State], probe: Probe) -> dict[str, list[str]]:
    """The result of probe(states) on each node, by the node's name."""
    task: Any = ray.remote(num_cpus=0, max_retries=1)(probe)
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
                f"node {nodes[node]} did not answer within {_SECONDS_TO_ANSWER:.0f} s whether it sees the files: check "
                "whether it is overloaded, or remove it from the cluster"
            ) from None
        except ray.exceptions.RayError as error:
            if any(info["NodeID"] == node and info["Alive"] for info in ray.nodes()):
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"node {nodes[node]} cannot run hasten ({reason}): install it there as here") from None
            # The node was lost meanwhile, and gets no actors.
    return found
