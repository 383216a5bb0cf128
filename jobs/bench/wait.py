"""A run of given duration and number of logged steps, to measure the overhead of sweeps of it.

It writes no section of docs/benchmarks.md: `hasten bench sweep` measures `hasten bench wait --multirun`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import Run, option, plain


@dataclass
class Config(Run):
    """Sleep or compute for a while, and log."""

    point: int = option(0, "number that distinguishes runs", at_least=0)
    wait_seconds: float = option(1.0, "seconds that a run takes", at_least=0)
    busy: bool = option(False, "compute all the time instead of sleeping")
    steps: int = option(0, "metric steps that are logged, evenly over the time", at_least=0)
    actor: bool = option(False, "wait in a Ray actor")
    fail: bool = option(False, "end with an error")
    threads: int = option(1, "CPUs of a run", at_least=1)
    done: str | None = option(None, "file to which every finished run appends a line", path="state")


def run(config: Config) -> Path:
    """Path of the report."""
    folder = start(config)
    with tracked(config, "bench wait", folder) as tracker:
        tracker.params(plain(config))
        wait = _actor() if config.actor else _wait
        begun = time.perf_counter()
        for step in range(max(1, config.steps)):
            wait(begun + config.wait_seconds * (step + 1) / max(1, config.steps) - time.perf_counter(), config.busy)
            if config.steps:
                tracker.metrics({"step": step, "square": step * step}, step)
        if config.fail:
            raise UserError("fail=true was asked for")
        if config.done:
            with Path(config.done).open("a") as file:
                file.write(f"{config.point}\n")
        metrics = {"point": config.point, "seconds": time.perf_counter() - begun}
        return tracker.report(
            {"job": "bench", "config": plain(config), "metrics": metrics, "layers": [], "output": None}
        )


def _wait(seconds: float, busy: bool) -> None:
    until = time.perf_counter() + seconds
    if not busy:
        time.sleep(max(0.0, seconds))
    while time.perf_counter() < until:
        pass


class Waiter:
    """The actor of `actor=true`; Ray restarts it when it is killed."""

    def wait(self, seconds: float, busy: bool) -> None:
        """Wait in the actor's process."""
        _wait(seconds, busy)


def _actor() -> Callable[[float, bool], None]:
    # Sweeps of runs without an actor must not pay for the import in every process.
    import ray

    waiter: Any = ray.remote(Waiter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()

    def wait(seconds: float, busy: bool) -> None:
        ray.get(waiter.wait.remote(seconds, busy))

    return wait
