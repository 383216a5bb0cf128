"""A Hydra launcher that runs the points of a sweep as Ray tasks, reports each as it ends, and retries lost ones.

hydra-ray-launcher returns all results only at the end, retries nothing and caps the object store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from hasten.cluster.programs.sweep_points import Ending, Pool, Source, Work


@dataclass
class RayLauncherConfig:
    """Node of the launcher in Hydra's store, `hydra/launcher=hasten_ray`."""

    _target_: str = "hasten.jobs.sweep.launcher.RayLauncher"
    retries: int = 3
    at_once: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="hasten_ray", node=RayLauncherConfig)


class RayLauncher(Launcher):
    """Runs points inside a Ray session. The task function of `setup` makes a point's `Work` from its overrides.

    `launch` runs a batch, for Hydra's sweepers; `stream` runs points that a source hands out while others end.
    """

    def __init__(self, retries: int = 3, at_once: int | None = None) -> None:
        self.pool = Pool(retries, at_once)
        self._work: Callable[[Sequence[str]], Work] | None = None

    def setup(self, *, hydra_context: object, task_function: Callable[[Sequence[str]], Work], config: object) -> None:
        """Set the function that makes a point's work and checks its options; Hydra's context is not used."""
        self._work = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all points of a batch; returns their results, with an `Ending` as value, in the order of the batch."""
        assert self._work is not None, "setup comes first"
        batch = _Batch([self._work(overrides) for overrides in job_overrides])
        self.stream(batch)
        results = []
        for overrides, work in zip(job_overrides, batch.works, strict=True):
            ending = batch.endings.get(work.name, Ending("stopped"))
            state = JobStatus.COMPLETED if ending.status == "finished" else JobStatus.FAILED
            results.append(JobReturn(overrides, status=state, working_dir=str(work.folder), _return_value=ending))
        return results

    def stream(self, source: Source) -> None:
        """Run points until the source has no more."""
        self.pool.run(source)


class _Batch:
    """Source of points that are all known in advance."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.endings: dict[str, Ending] = {}
        self._handed_out = 0

    def next(self) -> Work | None:
        if not self.left():
            return None
        self._handed_out += 1
        return self.works[self._handed_out - 1]

    def left(self) -> int:
        return len(self.works) - self._handed_out

    def started(self, work: Work) -> None:
        pass

    def ended(self, work: Work, ending: Ending) -> None:
        self.endings[work.name] = ending

    def waiting(self) -> None:
        pass
