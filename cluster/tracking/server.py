"""Runs MLflow's server for a store. While it serves a sqlite file, runs on this machine write through the server."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from hasten.accel.errors import UserError
from hasten.cluster.runtime.session_folders import empty_folder
from hasten.cluster.tracking import store

_START_SECONDS = 120.0


def serve(uri: str, host: str, port: int, in_browser: bool = False) -> int:
    """Run the server until it is interrupted; returns its exit code, 0 if it was told to end.

    UserError if the port is in use, or the store is or has a server already.
    """
    if uri.startswith(("http://", "https://")):
        raise UserError(f"{uri} is a server already: open it in a browser")
    url = f"http://{host}:{port}"
    running = store.serving(uri)
    if running:
        raise UserError(f"{running} serves this store already: open it in a browser")
    _check_port(host, port)
    command = [
        sys.executable,
        "-P",
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    # One worker, because only one process should write to a sqlite file.
    command += ["--workers", "1"]
    artifacts = store.artifact_location(uri)
    if artifacts:
        # Runs read and write artifacts directly, as they do without the server.
        command += ["--default-artifact-root", artifacts, "--no-serve-artifacts"]
    # Without MLflow's own jobs, such as evaluations by language models: their queues are seven more processes.
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # The server logs every request. The log goes to a temporary file, because a full pipe would block the server.
    # MLflow's web server imports from the current folder: that is an empty one.
    with tempfile.TemporaryFile("w+", errors="replace") as log, empty_folder() as empty:
        server = subprocess.Popen(command, cwd=empty, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        before = {
            number: signal.signal(number, lambda number, frame: server.terminate())
            for number in (signal.SIGTERM, signal.SIGHUP)
        }
        note = _note(uri)
        try:
            _wait_for(url, server, log)
            if note is not None:
                _write(note, url, server.pid)
            print(f"{url} shows {uri}; Ctrl-C ends it", flush=True)
            if in_browser:
                webbrowser.open(url)
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if note is not None:
                note.unlink(missing_ok=True)
            _end(server)
    return 0 if server.returncode in (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL) else int(server.returncode)


def _note(uri: str) -> Path | None:
    file = store.sqlite_file(uri)
    return None if file is None else store.server_file(file)


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port} cannot be used ({error.strerror}): take another port"
            ) from None


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: IO[str]) -> None:
    end = monotonic() + _START_SECONDS
    while monotonic() < end:
        if server.poll() is not None:
            log.seek(0)
            # SQLAlchemy ends its errors with a line that only links to an explanation.
            lines = [line for line in log.read().strip().splitlines() if not line.startswith("(Background on")]
            reason = lines[-1] if lines else f"exit code {server.returncode}"
            raise UserError(f"MLflow's server did not start: {reason}")
        try:
            store.check_reachable(url)
            return
        except UserError:
            sleep(0.2)
    raise UserError(f"MLflow's server did not answer at {url} within {_START_SECONDS:.0f} s")


def _write(note: Path, url: str, process: int) -> None:
    unfinished = note.with_name(f"{note.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps({"url": url, "host": platform.node(), "process": process}) + "\n", encoding="utf-8"
    )
    unfinished.replace(note)
