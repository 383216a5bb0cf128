"""Show the jobs that were submitted to a Ray cluster, or one of them."""

from typing import TYPE_CHECKING

from hasten.jobs.cli.commands._cluster import cluster_parser, ending, time_of

if TYPE_CHECKING:
    from hasten.cluster.submission.job_server import Job


def main(words: list[str]) -> int:
    """0 once the status is printed, whatever it is."""
    parser = cluster_parser("status", (__doc__ or "").strip())
    parser.add_argument("id", metavar="ID", nargs="?", help="the job; without it, all jobs that hasten submitted")
    arguments = parser.parse_args(words)
    from hasten.cluster.submission.job_server import JobServer

    server = JobServer(arguments.address)
    if arguments.id is None:
        jobs = server.jobs()
        print(_table(jobs) if jobs else f"no jobs at {server.url}")
    else:
        print(_one(server.job(arguments.id)))
    return 0


def _one(job: "Job") -> str:
    rows = {
        "job": job.name,
        "status": f"{job.status}, {ending(job)}",
        "exit code": "" if not job.is_over else str(job.code),
        "started": time_of(job.started),
        "ended": time_of(job.ended),
        "seconds": _seconds(job),
        "workdir": job.workdir,
        "command": f"hasten {job.words}",
    }
    return "\n".join(f"{key + ':':<11}{value}" for key, value in rows.items() if value)


def _table(jobs: list["Job"]) -> str:
    head = ("ID", "STATUS", "STARTED", "SECONDS", "COMMAND")
    rows = [head, *((job.name, job.status, time_of(job.started), _seconds(job), f"hasten {job.words}") for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _seconds(job: "Job") -> str:
    return "" if job.seconds is None else f"{job.seconds:.0f}"
