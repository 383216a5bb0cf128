"""Client of a Ray cluster's job server: submits, follows and stops jobs over HTTP."""

import asyncio
import json
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.cluster.runtime.authentication import refusal, use_token
from hasten.cluster.runtime.session import mismatch
from hasten.cluster.submission.code_package import pack

_LOG = logging.getLogger(__name__)
_PORT = 8265
# Largest upload that Ray's dashboard accepts.
_UPLOAD_BYTES = 100 * 2**20
_SECONDS_TO_ANSWER = 10.0
_POLL_SECONDS = 0.5
# Number of reconnections while following a job, enough for a restart of the dashboard.
_RECONNECTS = 20
_ATTEMPTS = 3
_START = "start Ray there with `ray start --head`; the address is the dashboard's, http://HOST:8265"
_MARK = "hasten"
# Stop jobs with SIGINT, as Ctrl-C does, instead of SIGTERM, and with time for it: sweeps stop their points, and tracked
# runs are marked KILLED.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """A submitted job.

    words: the command line after `hasten`. status: Ray's, such as RUNNING. exit_code: None unless it ended by itself.
    started, ended: seconds since 1970.
    """

    name: str
    words: str
    workdir: str
    status: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def code(self) -> int:
        """Exit code for a shell: the job's own, 130 if it was stopped, 1 if Ray could not run it."""
        if self.status == "STOPPED":
            return INTERRUPTED
        if self.exit_code is None:
            return 0 if self.status == "SUCCEEDED" else 1
        # Death by a signal is a negative number in Python, and 128 plus the signal's number in a shell.
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def seconds(self) -> float | None:
        """Seconds that the job has been running, or ran; None if it has not started."""
        return None if self.started is None else (self.ended or time.time()) - self.started


def dashboard_url(address: str | None) -> str:
    """URL of the job server at address: http://HOST:8265, HOST:8265 or HOST.

    None and `auto` take the server of RAY_API_SERVER_ADDRESS, else that of RAY_ADDRESS, else that of this machine.
    """
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_API_SERVER_ADDRESS") or ""
        ray_address = os.environ.get("RAY_ADDRESS", "")
        if not address and ray_address not in ("", "auto", "local"):
            # HOST:6379 and ray://HOST:10001 are other servers of the host: only the host is used.
            is_dashboard = ray_address.startswith(("http://", "https://"))
            host = ray_address.split("://")[-1]
            address = ray_address if is_dashboard else host.rpartition(":")[0] or host
        address = address or "127.0.0.1"
    if "://" not in address:
        address = f"http://{address}"
    scheme, _, host = address.rstrip("/").partition("://")
    if scheme not in ("http", "https") or not host:
        raise UserError(f"address={address} is wrong: expected http://HOST:{_PORT}, HOST:{_PORT} or auto")
    if scheme == "http" and ":" not in host.rpartition("]")[2] and "/" not in host:
        host = f"{host}:{_PORT}"
    return f"{scheme}://{host}"


class JobServer:
    """The job server of a cluster; UserError if it does not answer, has another Ray version, or rejects the token."""

    def __init__(self, address: str | None) -> None:
        self.url = dashboard_url(address)
        _probe(self.url)
        import ray
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._errors(), _address(self.url):
            self._client: Any = JobSubmissionClient(self.url)
        theirs = getattr(self._client, "_server_ray_version", None)
        if theirs is not None and theirs != ray.__version__:
            raise mismatch(f"address={self.url}", (theirs, None), (ray.__version__, None))

    def submit(
        self,
        words: Sequence[str],
        workdir: str,
        env: str,
        runtime_env: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        """Submit `hasten WORDS`, to run in the folder workdir of the cluster's head node; returns the job's id.

        env: see code_package.source. runtime_env: Ray's, merged with hasten's. name: the id; None generates one.
        """
        environment = dict(runtime_env or {})
        environment["env_vars"] = _STOP | environment.get("env_vars", {})
        if env != "none" and "working_dir" in environment:
            raise UserError(
                "--runtime-env sets working_dir, which hasten's code needs: remove it, or send no code with --env none"
            )
        name = name or f"hasten-{words[0]}-{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
        with tempfile.TemporaryDirectory() as folder:
            if env != "none":
                package = Path(folder, "hasten.zip")
                pack(env, package)
                _check_size(package)
                environment["working_dir"] = str(package)
            # -P keeps the current folder off the import path, so that the sent code is used.
            entrypoint = shlex.join(["python", "-P", "-m", "hasten.jobs.cli.submitted", workdir, *words])
            metadata = {_MARK: shlex.join(words), "workdir": workdir, "submission": uuid.uuid4().hex}
            with self._errors():
                self._submit(entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=metadata)
        return name

    def _submit(self, **job: object) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._client.submit_job(**job)
                return
            except OSError:
                # A busy dashboard drops connections, sometimes after it has accepted the job.
                if attempt == _ATTEMPTS:
                    raise
            except RuntimeError:
                if attempt > 1 and self._client.get_job_info(job["submission_id"]).metadata == job["metadata"]:
                    return
                raise
            time.sleep(_POLL_SECONDS)

    def job(self, name: str) -> Job:
        """The job with this id; UserError if there is none."""
        with self._errors(name):
            return _job(self._client.get_job_info(name))

    def jobs(self) -> list[Job]:
        """All jobs that hasten has submitted to the cluster, in the order of their start."""
        with self._errors():
            details = [job for job in self._client.list_jobs() if _MARK in (job.metadata or {})]
        return sorted((_job(job) for job in details), key=lambda job: job.started or 0.0)

    def logs(self, name: str) -> str:
        """Everything that a job has printed."""
        with self._errors(name):
            text: str = self._client.get_job_logs(name)
        return text

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Call write with all that a job has printed and prints until it ends; returns the ended job."""
        written = 0

        async def tail() -> None:
            nonlocal written
            position = 0
            async for text in self._client.tail_job_logs(name):
                # After a lost connection Ray sends the log from its beginning.
                new = text[max(written - position, 0) :]
                position += len(text)
                written = max(written, position)
                if new:
                    write(new)

        ended = self.job(name)
        if ended.is_over:
            # Its log is read at once: Ray's stream ends seconds after the last line.
            log = self.logs(name)
            if log:
                write(log)
            return ended
        lost = 0
        while True:
            try:
                with self._errors(name):
                    asyncio.run(tail())
                    ended = self.job(name)
                if ended.is_over:
                    # Ray can end the stream before the job's last lines: these are read from the whole log.
                    rest = self.logs(name)[written:]
                    if rest:
                        write(rest)
                    return ended
                lost = 0
            except UserError:
                lost += 1
                if lost > _RECONNECTS:
                    raise
            time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> bool:
        """Stop a job and wait until it has ended; returns whether it was still running."""
        with self._errors(name):
            was_running = bool(self._client.stop_job(name))
        while was_running and not self.job(name).is_over:
            time.sleep(_POLL_SECONDS)
        return was_running

    @contextmanager
    def _errors(self, name: str | None = None) -> Iterator[None]:
        """Context that turns errors of Ray's client into a UserError of one line. name: of the requested job."""
        try:
            yield
        except UserError:
            raise
        # OSError includes the errors of requests.
        except (OSError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            if name is not None and "status code 404" in text:
                raise UserError(f"there is no job {name} at {self.url}: hasten status lists all jobs") from None
            if "already exists" in text:
                raise UserError(f"a job with this name exists already at {self.url}: choose another --name") from None
            if isinstance(error, OSError):
                raise UserError(f"address={self.url} does not answer ({text[:200]}): {_START}") from None
            raise UserError(f"{self.url} refuses the request: {text[-300:]}") from None
        except Exception as error:
            if type(error).__module__.startswith("aiohttp"):
                raise UserError(f"address={self.url} does not answer ({type(error).__name__}): {_START}") from None
            if type(error).__name__ != "AuthenticationError":
                raise
            raise refusal(f"address={self.url}") from None


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        name=details.submission_id or details.job_id,
        words=metadata.get(_MARK, details.entrypoint),
        workdir=metadata.get("workdir", ""),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )


def _probe(url: str) -> None:
    """UserError unless a Ray dashboard answers. If it requires a token, the token is sent from here on."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=_SECONDS_TO_ANSWER) as answer:
            is_ray = "ray_version" in json.load(answer)
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)
        if is_ray and not use_token():
            raise refusal(f"address={url}") from None
    except ValueError:
        is_ray = False
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"address={url} does not answer ({getattr(reason, 'strerror', None) or reason}): {_START}"
        ) from None
    if not is_ray:
        raise UserError(f"address={url} is no Ray dashboard: {_START}")


@contextmanager
def _address(url: str) -> Iterator[None]:
    """Context with RAY_API_SERVER_ADDRESS=url: Ray prefers this variable to an address that is passed to it."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_size(package: Path) -> None:
    size = package.stat().st_size
    if size > _UPLOAD_BYTES:
        raise UserError(
            f"the code is {size / 2**20:.1f} MiB, and Ray's dashboard takes {_UPLOAD_BYTES // 2**20} MiB: move large "
            "files out of the checkout's packages, or install hasten on the cluster and use --env none"
        )
    _LOG.info("sending %.1f MiB of code", size / 2**20)
