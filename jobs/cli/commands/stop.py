"""Stop a submitted job; submitted again with the same words, it resumes."""

from hasten.jobs.cli.commands._cluster import cluster_parser, ending


def main(words: list[str]) -> int:
    """0 once the job has ended."""
    parser = cluster_parser("stop", (__doc__ or "").strip())
    parser.add_argument("id", metavar="ID", help="the job, as hasten status lists it")
    arguments = parser.parse_args(words)
    from hasten.cluster.submission.job_server import JobServer

    server = JobServer(arguments.address)
    server.stop(arguments.id)
    print(f"{arguments.id} {ending(server.job(arguments.id))}")
    return 0
