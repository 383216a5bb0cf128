"""Shared by the commands about submitted jobs: the argument --address, and following a job's output."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING

from hasten.jobs.cli.commands._arguments import Parser

if TYPE_CHECKING:
    from hasten.cluster.submission.job_server import Job, JobServer

ADDRESS = "the cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's"


def cluster_parser(command: str, description: str) -> Parser:
    """Argument parser of a command, with --address."""
    parser = Parser(command, description)
    parser.add_argument("--address", metavar="URL", help=ADDRESS)
    return parser


def follow(server: "JobServer", name: str) -> int:
    """Print a job's output until it ends; returns its exit code, or 130 after Ctrl-C, which leaves it running."""
    try:
        job = server.follow(name, _print)
    except KeyboardInterrupt:
        where = f"--address {server.url} {name}"
        print(
            f"\n{name} keeps running: hasten logs --follow {where} shows it, hasten stop {where} ends it",
            file=sys.stderr,
        )
        return 130
    if job.status != "SUCCEEDED" and job.exit_code is None:
        print(f"{name} {ending(job)}", file=sys.stderr)
    return int(job.code)


def ending(job: "Job") -> str:
    """Status of a job in words, one line."""
    if job.status == "FAILED":
        text = job.message.strip().splitlines() or [""]
        return f"failed with exit code {job.exit_code}" if job.exit_code is not None else f"failed: {text[-1][-300:]}"
    known = {"PENDING": "is waiting", "RUNNING": "is running", "SUCCEEDED": "has finished", "STOPPED": "was stopped"}
    return known.get(job.status, job.status)


def time_of(seconds: float | None) -> str:
    """Local time of a Unix timestamp, empty for None."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
