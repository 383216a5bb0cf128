"""Print what a submitted job has printed."""

from hasten.jobs.cli.commands._cluster import follow, parser


def main(words: list[str]) -> int:
    """0, or with --follow the exit code of the job."""
    found = parser("logs", (__doc__ or "").strip())
    found.add_argument("--follow", action="store_true", help="go on until the job is over; the exit code is the job's")
    found.add_argument("id", metavar="ID", help="the job, as hasten status lists it")
    asked = found.parse_args(words)
    from hasten.cluster.submission.job_server import JobServer

    server = JobServer(asked.address)
    if asked.follow:
        return follow(server, asked.id)
    print(server.logs(asked.id), end="")
    return 0
