"""The jobs that have plans."""

from hasten.accel.errors import UserError
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.registry import jobs


def planned_jobs() -> list[str]:
    """Names of the jobs that have an estimate."""
    return [job.name for job in jobs().values() if job.estimate is not None]


def planned_job(name: str) -> Job:
    """The job of that name; UserError if it does not exist or has no plan."""
    if name not in planned_jobs():
        raise UserError(f"{name} has no plan: there are plans of {', '.join(planned_jobs())}")
    return jobs()[name]
