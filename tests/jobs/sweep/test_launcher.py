"""The launcher under Hydra's own interface."""

from functools import partial
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher

from hasten.cluster.programs.sweep_points import Work
from hasten.cluster.tracking.tracker import write_report
from hasten.jobs.sweep.launcher import RayLauncher


def run(folder: Path, value: int) -> None:
    if value == 2:
        raise ValueError("two is wrong")
    write_report(folder, {"metrics": {"square": value * value}})


def test_results_of_a_batch_are_in_order_and_include_failures(tmp_path, ray_session):
    def work(overrides):
        value = int(overrides[0].partition("=")[2])
        return Work(f"point-{value}", tmp_path / str(value), partial(run, tmp_path / str(value), value))

    launcher = RayLauncher(retries=0)
    assert isinstance(launcher, Launcher)
    launcher.setup(hydra_context=None, task_function=work, config=None)
    found = launcher.launch([[f"value={value}"] for value in (1, 2, 3)], 0)
    assert [each.overrides for each in found] == [["value=1"], ["value=2"], ["value=3"]]
    assert [each.status for each in found] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert found[1]._return_value.error == {"type": "ValueError", "message": "two is wrong"}
    assert "two is wrong" in (tmp_path / "2" / "output.txt").read_text()


def test_hydra_knows_it_by_name():
    node = ConfigStore.instance().load("hydra/launcher/hasten_ray.yaml").node
    assert node._target_ == "hasten.jobs.sweep.launcher.RayLauncher"
