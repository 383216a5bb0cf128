"""A Ray head as `ray start --head` makes it: with its own ports, folder and token, and ended by its own process ids."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from hasten.cluster.runtime.session_folders import short_folder

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Head:
    """port: of the cluster; url: of its dashboard; token: the file that holds its token."""

    port: int
    url: str
    token: Path

    def environment(self, **changes):
        """Variables of a process that talks to the head; None takes one away."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        ours |= {"RAY_AUTH_TOKEN_PATH": str(self.token), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes
        return {key: value for key, value in ours.items() if value is not None}

    def python(self, *words, cwd, **changes):
        """What a Python process that talks to the head did."""
        environment = self.environment(**changes)
        return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)

    def hasten(self, command, *words, cwd, **changes):
        """What `hasten COMMAND --address … WORDS` did."""
        return self.python("-m", "hasten", command, "--address", self.url, *words, cwd=cwd, **changes)


@contextmanager
def started(cpus=2):
    """A head that takes jobs, for the time of the block."""
    # A socket's path may have 107 bytes, of which Ray takes most: neither a folder of pytest's nor a long TMPDIR.
    folder = Path(tempfile.mkdtemp(prefix="h", dir=short_folder()))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        port, dashboard, client, agent = _free_ports(4)
        head = Head(port, f"http://127.0.0.1:{dashboard}", folder / "token")
        head.token.write_text(os.urandom(32).hex())
        environment = head.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(head.token))
        # Jobs run the `python` that is found first.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        log = stack.enter_context((folder / "start.log").open("w+"))
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process, head.token)
        while not _answers(head):
            if process.poll() is not None:
                raise RuntimeError((folder / "start.log").read_text())
            time.sleep(0.2)
        yield head


def _free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(head):
    request = urllib.request.Request(f"{head.url}/api/jobs/")
    request.add_header("Authorization", f"Bearer {head.token.read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


def _end(process, token):
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    # Whoever knows the token is the head's, or was started by it.
    for each in psutil.process_iter():
        try:
            if each.environ().get("RAY_AUTH_TOKEN_PATH") == str(token):
                each.kill()
        except psutil.Error:
            pass
