"""Print the output of a submitted job."""

from hasten.jobs.cli.commands._cluster import cluster_parser, follow


def main(words: list[str]) -> int:
    """0, or with --follow the exit code of the job."""
    parser = cluster_parser("logs", (__doc__ or "").strip())
    parser.add_argument("--follow", action="store_true", help="follow until the job ends; the exit code is the job's")
    parser.add_argument("id", metavar="ID", help="the job, as hasten status lists it")
    arguments = parser.parse_args(words)
    from hasten.cluster.submission.job_server import JobServer

    server = JobServer(arguments.address)
    if arguments.follow:
        return follow(server, arguments.id)
    print(server.logs(arguments.id), end="")
    return 0
