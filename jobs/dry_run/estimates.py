"""Estimate of a whole run: the job's own, and the imports, Ray and report that every job has."""

import dataclasses

from hasten.accel.costs.estimate import DRIVER, Estimate, Process, Rates, Step
from hasten.jobs.common.schema import Run
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.dry_run.setting import Setting

# CPU seconds of Ray's own processes, in those of a worker's start.
_RAY_STARTS = 2


def estimate(job: Job, config: Run, setting: Setting) -> Estimate:
    """Estimate of a whole run of a job that has a plan; UserError for what the job itself would refuse."""
    return _surrounded(job.estimate_of(config, setting), setting.rates, job.in_ray)


def _surrounded(found: Estimate, rates: Rates, uses_ray: bool) -> Estimate:
    """With what every job takes: imports, Ray, the report."""
    # Evaluations count the start of their processes themselves.
    actors = [process for process in found.processes if process.kind not in (DRIVER, "evaluation")]
    steps = [Step("imports", rates.start, rates.start)]
    if uses_ray:
        # Ray's own processes import for themselves, beside each other.
        steps.append(Step("start Ray", rates.session, _RAY_STARTS * rates.start))
    if actors and uses_ray:
        stages, number = len({process.stage for process in actors}), sum(process.count for process in actors)
        steps.append(Step("start the actors", rates.start * stages, rates.start * number))
    processes = found.processes
    if all(process.kind != DRIVER for process in processes):
        processes += (Process(DRIVER, 1, 0, {"run": {"process": rates.driver_bytes}}),)
    steps += [*found.steps, Step("report", rates.finish, rates.finish)]
    return dataclasses.replace(found, processes=processes, steps=tuple(steps))
