"""The descriptor of a job: everything that help, sweeps, plans, reports and submission know of it.

A job is a folder of jobs/ with a module `job.py`, whose JOB is the descriptor, and conf/JOB.yaml. Functions are named
as `module:function` and imported when they are called, so that `hasten --help` stays fast.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.jobs.common.schema import Run
from hasten.jobs.descriptors.metrics import Metric

if TYPE_CHECKING:
    from hasten.accel.costs.estimate import Estimate
    from hasten.jobs.dry_run.setting import Setting, Shapes


class Needs(NamedTuple):
    """Resources of a run on a cluster.

    cpus, gpus: of the run's own process. threads: of each process. actors: Ray resources of every actor that it starts.
    """

    cpus: float
    gpus: float
    threads: int
    actors: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class Variants:
    """Several jobs under one name, chosen by a second word: `hasten JOB NAME`.

    kind: noun for one of them. names: returns all NAMEs, in order. summary: returns the first sentence of a variant's
    module, without importing it. find: returns a variant's descriptor.
    """

    kind: str
    names: Callable[[], list[str]]
    summary: Callable[[str], str]
    find: Callable[[str], "Job"]

    def missing(self, words: str) -> str:
        """Error message for a command without NAME; words: the command's."""
        return f"hasten {words} needs the name of a {self.kind}: {', '.join(self.names())}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job.

    position: sort key in `hasten --help`. options: the dataclass of options, whose docstring is the help text.
    Functions, named as `module:function`:
      run: from the config to the path of report.json; None if only the job's variants run.
      needs: from the config to Needs.
      estimate: from the config and a Setting to an Estimate of the job's own work; None if the job has no plan, for the
        reason in not_planned.
      shapes: from the config and the number of GPUs of a worker to Shapes.
    in_ray: whether a run starts actors or tasks in Ray. metrics: those of its report, in the order of table columns.
    objectives: metrics that a sweep shows by default; it optimizes the first.
    examples: command lines for the help. output_in_run_dir: by default outputs are written to run_dir.
    shares_state: all points of a sweep may share a file that a run both reads and changes.
    """

    name: str
    position: int
    options: type[Run]
    run: str | None = None
    needs: str = "hasten.jobs.descriptors.needs:of_workers"
    estimate: str | None = None
    not_planned: str = ""
    shapes: str = "hasten.jobs.dry_run.models:shapes"
    in_ray: bool = True
    metrics: tuple[Metric, ...] = ()
    objectives: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    output_in_run_dir: bool = False
    shares_state: bool = False
    variants: Variants | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        if (self.estimate is None) == (not self.not_planned):
            raise ValueError(f"the job {self.name} needs an estimate, or a reason in not_planned, and not both")

    @property
    def title(self) -> str:
        """Name of the job in titles and folders of runs and sweeps."""
        return self.variant or self.name

    @property
    def words(self) -> list[str]:
        """The words of the command line that name the job."""
        return [self.name] if self.variant is None else [self.name, self.variant]

    @property
    def summary(self) -> str:
        """One sentence on what the job does."""
        if self.variants is not None and self.variant is not None:
            return self.variants.summary(self.variant) + "."
        return " ".join((self.options.__doc__ or "").split())

    @property
    def module(self) -> str:
        """Import path of the module of its run function."""
        assert self.run is not None, f"only variants of {self.name} run"
        return self.run.partition(":")[0]

    def start(self, config: Run) -> Path | str | None:
        """Run the job on a config without URIs; returns the path of its report, None if it writes none."""
        assert self.run is not None, f"only variants of {self.name} run"
        report: Path | str | None = load(self.run)(config)
        return report

    def needs_of(self, config: Run) -> Needs:
        """Resources of a run with this config."""
        needs: Needs = load(self.needs)(config)
        return needs

    def estimate_of(self, config: Run, setting: "Setting") -> "Estimate":
        """Estimate of the job's own work; UserError for options that the job itself would refuse."""
        assert self.estimate is not None, self.not_planned
        estimate: Estimate = load(self.estimate)(config, setting)
        return estimate

    def shapes_of(self, config: Run, gpus: int) -> "Shapes":
        """Shapes at which a plan measures rates; gpus: GPUs of every worker."""
        shapes: Shapes = load(self.shapes)(config, gpus)
        return shapes


def load(path: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
