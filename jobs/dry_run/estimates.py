"""Estimate of a whole run: that of the job, and the imports, Ray and report of every job."""

import dataclasses

from hasten.accel.costs.estimate import DRIVER, Estimate, Process, Rates, Step
from hasten.jobs.common.schema import Run
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.dry_run.setting import Setting

# CPU seconds of those of Ray's own processes that start with a job, as a multiple of a worker's start.
_RAY_STARTS = 0.5


def estimate(job: Job, config: Run, setting: Setting) -> Estimate:
    """Estimate of a whole run of a job that has a plan; UserError for options that the job itself would refuse."""
    if setting.nodes > 1 or setting.gpus or getattr(config, "address", None) is not None:
        # A Ray that the job does not start itself.
        setting = dataclasses.replace(setting, rates=dataclasses.replace(setting.rates, forked=None))
    return _with_overheads(job.estimate_of(config, setting), setting.rates, job.in_ray)


def _with_overheads(own: Estimate, rates: Rates, uses_ray: bool) -> Estimate:
    """A job's own estimate plus imports, Ray and the report."""
    # Estimates of evaluations include the start of their processes.
    actors = [process for process in own.processes if process.kind not in (DRIVER, "evaluation")]
    steps = [Step("imports", rates.start, rates.start)]
    if uses_ray:
        # Ray's own processes import in parallel, and so does the one that workers are forked from.
        imported = _RAY_STARTS + (rates.forked is not None)
        steps.append(Step("start Ray", rates.session, imported * rates.start))
    if actors and uses_ray:
        stages, number = len({process.stage for process in actors}), sum(process.count for process in actors)
        steps.append(Step("start the actors", rates.worker_start * stages, rates.worker_start * number))
    processes = own.processes
    if all(process.kind != DRIVER for process in processes):
        processes += (Process(DRIVER, 1, 0, {"run": {"process": rates.driver_bytes}}),)
    steps += [*own.steps, Step("report", rates.finish, rates.finish)]
    return dataclasses.replace(own, processes=processes, steps=tuple(steps))
