"""The registry of jobs: all folders of jobs/ with a descriptor, and the metrics of these jobs."""

from functools import cache
from importlib import import_module
from pathlib import Path

import hasten.jobs
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import PEAK_RSS_BYTES, SECONDS, Metric


@cache
def jobs() -> dict[str, Job]:
    """Jobs by name, in the order of `hasten --help`."""
    names = sorted(path.parent.name for folder in hasten.jobs.__path__ for path in Path(folder).glob("*/job.py"))
    descriptors: list[Job] = [import_module(f"hasten.jobs.{name}.job").JOB for name in names]
    return {job.name: job for job in sorted(descriptors, key=lambda job: (job.position, job.name))}


def job_of(name: str, variant: str | None = None) -> Job:
    """The descriptor of a job, or of one of its variants."""
    job = jobs()[name]
    if variant is None:
        return job
    assert job.variants is not None, f"{name} has no variants"
    return job.variants.find(variant)


@cache
def metrics() -> dict[str, Metric]:
    """Metrics of all jobs by name, in the order of a table's columns."""
    listed = [metric for job in jobs().values() for metric in job.metrics]
    return {metric.name: metric for metric in (*listed, PEAK_RSS_BYTES, SECONDS)}
