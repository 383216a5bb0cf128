"""Stop a submitted job; the same command submitted again goes on where it was."""

from hasten.jobs.cli.commands._cluster import ending, parser


def main(words: list[str]) -> int:
    """0 once the job is over."""
    found = parser("stop", (__doc__ or "").strip())
    found.add_argument("id", metavar="ID", help="the job, as hasten status lists it")
    asked = found.parse_args(words)
    from hasten.cluster.submission.job_server import JobServer

    server = JobServer(asked.address)
    server.stop(asked.id)
    print(f"{asked.id} {ending(server.job(asked.id))}")
    return 0
