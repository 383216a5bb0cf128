"""The descriptor of a job: everything that help, sweeps, plans, reports and submission know of it.

A job is a folder of jobs/ with a module `job.py`, whose JOB is the descriptor, and conf/JOB.yaml. What runs, plans or
measures is named as `module:function` and imported when it is called, so that `hasten --help` stays quick.
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
    """What a run takes of a cluster.

    cpus, gpus: of its own process; threads: of each process; actors: resources of every actor that it starts.
    """

    cpus: float
    gpus: float
    threads: int
    actors: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class Variants:
    """Jobs under one name, told apart by a second word: `hasten JOB NAME`.

    kind: what one of them is called. names: all of them, in order. summary: what one does, in a sentence, read
    without importing it. find: the descriptor of one.
    """

    kind: str
    names: Callable[[], list[str]]
    summary: Callable[[str], str]
    find: Callable[[str], "Job"]

    def missing(self, words: str) -> str:
        """The refusal of a command that names none; words: of the command."""
        return f"hasten {words} needs the name of a {self.kind}: {', '.join(self.names())}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job. position: in `hasten --help`, the smallest first. options: the dataclass, whose docstring is the help.

    run: `module:function` from the options to the path of report.json; None of a job
    whose variants run. needs: from the options to Needs.
    estimate: from the options and a Setting to an Estimate of the run's own work; None where a run cannot be planned,
    and not_planned says why. shapes: from the options and the GPUs of a worker to Shapes.
    in_ray: the run starts actors or tasks in Ray. metrics: of its report, the columns of a table in order.
    objectives: metrics that a sweep shows where none is named, the first of which it optimises.
    examples: command lines for the help. output_in_run_dir: results lie in run_dir where no output is named.
    shares_state: files that a run both reads and changes are meant for all points of a sweep.
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
        """What runs, sweeps and their folders are named after."""
        return self.variant or self.name

    @property
    def words(self) -> list[str]:
        """The words of the command line that name the job."""
        return [self.name] if self.variant is None else [self.name, self.variant]

    @property
    def summary(self) -> str:
        """What the job does, in one sentence."""
        if self.variants is not None and self.variant is not None:
            return self.variants.summary(self.variant) + "."
        return " ".join((self.options.__doc__ or "").split())

    @property
    def module(self) -> str:
        """The module that runs it."""
        assert self.run is not None, f"only variants of {self.name} run"
        return self.run.partition(":")[0]

    def start(self, config: Run) -> Path | str | None:
        """Run the job with local paths; path of its report, None where it writes none."""
        assert self.run is not None, f"only variants of {self.name} run"
        report: Path | str | None = load(self.run)(config)
        return report

    def needs_of(self, config: Run) -> Needs:
        """What a run with these options takes."""
        found: Needs = load(self.needs)(config)
        return found

    def estimate_of(self, config: Run, setting: "Setting") -> "Estimate":
        """What a run's own work holds, moves, writes and takes; UserError for what the job itself would refuse."""
        assert self.estimate is not None, self.not_planned
        found: Estimate = load(self.estimate)(config, setting)
        return found

    def shapes_of(self, config: Run, gpus: int) -> "Shapes":
        """What rates are measured at; gpus: of every worker."""
        found: Shapes = load(self.shapes)(config, gpus)
        return found


def load(path: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
