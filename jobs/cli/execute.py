"""Runs a composed job: replaces URIs by local paths and calls the job's run function."""

from pathlib import Path

from hasten.cluster.storage.naming import as_given
from hasten.jobs.common.gates import exit_code
from hasten.jobs.common.logs import log_to_terminal, log_traceback
from hasten.jobs.common.schema import Run
from hasten.jobs.common.storage import local_paths
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.registry import job_of


def execute(job: Job, config: Run) -> tuple[str | None, int]:
    """Run a job, with local paths in place of URIs.

    Returns the path or URI of its report, None if it has none, and the exit code: 3 if a quality gate failed, else 0.
    """
    with local_paths(job.options, config) as local:
        report = job.start(local)
        if report is None:
            return None, 0
        return str(as_given(str(report))), exit_code(Path(report)) if getattr(local, "gate", None) else 0


def run_job(name: str, variant: str | None, config: Run) -> None:
    """Run a job in this process as the command line would."""
    log_to_terminal()
    try:
        execute(job_of(name, variant), config)
    except BaseException as error:
        log_traceback(error)
        raise
