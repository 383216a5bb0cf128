"""Ray sessions: joins a cluster by its address, or starts Ray on this machine for the time of a job."""

import logging
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import IO, Any

import ray
from ray.exceptions import AuthenticationError

from hasten.accel.errors import UserError
from hasten.cluster.runtime.authentication import make_token, refusal, use_token
from hasten.cluster.runtime.prefork import forked_workers
from hasten.cluster.runtime.ray_processes import fewer_processes
from hasten.cluster.runtime.session_folders import current_folder, empty_folder, ray_folder

_LOG = logging.getLogger(__name__)
_SECONDS_TO_ANSWER = 10.0
# Variables with paths, made absolute because the workers have another current folder.
_FOLDERS = ("HASTEN_CACHE", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")
_START = "start Ray there with `ray start --head`, or leave address out to start it on this machine"


@contextmanager
def session(address: str | None, cpus: int, exactly: bool = False) -> Iterator[None]:
    """Context with a Ray session; a session that is already open in this process is used and left open.

    address: of a cluster; `auto` is the one of RAY_ADDRESS or the one on this machine; None starts Ray on this machine.
    cpus: sum over the job's actors. Ray on this machine offers at least that many, even if the machine has fewer cores,
    and with `exactly` no more.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray hides all GPUs from actors that request none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in _FOLDERS:
        folder = os.environ.get(name)
        if folder and not folder.startswith("~"):
            os.environ[name] = os.path.abspath(folder)
    with ExitStack() as stack:
        temporary = None if address else stack.enter_context(ray_folder())
        if not address:
            # Before Ray, so that its imports and Ray's start take place at the same time.
            stack.enter_context(forked_workers())
        with current_folder(stack.enter_context(empty_folder())):
            if address:
                _join(address)
            else:
                _start_here(cpus if exactly else max(cpus, os.cpu_count() or 1), temporary)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise _dashboard(address)
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    _check_port(target, address)
    use_token()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        try:
            with _stderr_to(stderr):
                _check_token(target)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            ray.shutdown()
            stderr.seek(0)
            raise _explained(f"address={address}", error, stderr.read()) from None


def _check_port(target: str, address: str) -> None:
    """UserError if nothing listens at the address, or a web server does; Ray itself would try for minutes."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or "/" in target:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER) as line:
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = line.recv(5)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f" (RAY_ADDRESS={target})" if target != address else ""
        raise UserError(f"address={address}{where} does not answer ({reason}): {_START}") from None
    if answer == b"HTTP/":
        raise _dashboard(address)


def _check_token(target: str) -> None:
    """AuthenticationError if the cluster refuses this process's token; Ray itself would try for 20 seconds."""
    if ":" not in target:
        return
    raylet: Any = import_module("ray._raylet")
    refused: list[AuthenticationError] = []

    def ask() -> None:
        try:
            raylet.GcsClient(address=target)
        except AuthenticationError as error:
            refused.append(error)
        except Exception:
            # Ray tries again, and says what is wrong.
            _LOG.debug("the first try to reach %s failed", target, exc_info=True)

    # One that does not answer is not waited for twice.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS_TO_ANSWER)
    if refused:
        raise refused[0]


def _dashboard(address: str) -> UserError:
    return UserError(
        f"address={address} is a dashboard, to which `hasten submit --address` sends jobs: for a job itself, give "
        "address=HOST:6379 or address=auto"
    )


@contextmanager
def _stderr_to(file: IO[str]) -> Iterator[None]:
    """Redirect file descriptor 2, to which Ray's C++ code writes directly, to a file."""
    sys.stderr.flush()
    original = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)


def _explained(cluster: str, error: Exception, stderr: str) -> UserError:
    """An error in one line for what Ray raised, and wrote to stderr, when it could not join a cluster."""
    text = str(error).strip()
    if type(error).__name__ == "AuthenticationError" or "Unauthenticated" in stderr:
        return refusal(cluster)
    versions = re.findall(r"(Ray|Python): *(\S+)", text)
    if "ersion mismatch" in text and len(versions) == 4:
        (_, theirs), (_, their_python), (_, ours), (_, our_python) = versions
        return mismatch(cluster, (theirs, their_python), (ours, our_python))
    return UserError(f"{cluster} does not answer ({_line(error)}): {_START}")


def _line(error: Exception) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def mismatch(cluster: str, theirs: tuple[str, str | None], ours: tuple[str, str | None]) -> UserError:
    """The error for a cluster with other versions of (Ray, Python) than this machine; None: not compared."""
    if theirs[0] != ours[0]:
        return UserError(
            f"{cluster} runs Ray {theirs[0]}, and this machine Ray {ours[0]}: they must be the same, "
            f"pip install 'ray[default]=={theirs[0]}' here or 'ray[default]=={ours[0]}' on every node"
        )
    return UserError(
        f"{cluster} runs Python {theirs[1]}, and this machine Python {ours[1]}: they must be the same, "
        f"install Python {theirs[1]} here or use `hasten submit`, which runs the whole job on the cluster"
    )


def _start_here(cpus: int, temporary: str | None) -> None:
    make_token()
    _LOG.info("starting Ray on this machine")
    for attempt in (1, 2):
        try:
            with fewer_processes():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _temp_dir=temporary,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:
            # On a busy machine the start can exceed a fixed time limit inside Ray.
            ray.shutdown()
            if attempt == 2:
                raise UserError(
                    f"Ray does not start on this machine ({_line(error)}): it may be too busy, or lack memory or "
                    "disk space"
                ) from error
            _LOG.warning("Ray did not start in time; trying once more")
