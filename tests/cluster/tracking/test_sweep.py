"""A sweep in MLflow, written by drivers that may die at any call: one parent, each point and each step exactly once."""

from pathlib import Path
from typing import Any

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.tracking.events import Metrics, Params
from hasten.cluster.tracking.journal import Journal
from hasten.cluster.tracking.sweep import SweepTracker

WRITES = ("create_run", "delete_run", "update_run", "set_tag", "log_batch", "log_artifact", "set_terminated")


class Driver:
    """How many calls that write a driver makes before it dies."""

    left = float("inf")

    def counted(self, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.left <= 0:
                raise ConnectionError("the driver is dead")
            self.left -= 1
            return function(*arguments, **named)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    from mlflow import MlflowClient

    driver = Driver()
    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, driver.counted(getattr(MlflowClient, name)))
    return driver


def tracker(uri: str, folder: Path, key: str = "k") -> SweepTracker:
    return SweepTracker(uri, "tests", "the sweep", key, folder)


def tell(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last):
        journal.write(Metrics({"step": step}, step, 1_700_000_000_000 + step))


def run_sweep(uri: str, folder: Path, key: str, points: int, steps: int) -> None:
    """What a driver does whose points say half of what they have to say before it looks first, if they still run."""
    with tracker(uri, folder, key) as sweep:
        sweep.params({"bits": "4"})
        journals = {}
        for number in range(points):
            point, place = f"p{number}", folder / f"p{number}"
            if not (place / "report.json").exists():
                journals[point] = Journal(place)
                journals[point].write(Params({"point": str(number)}))
                tell(journals[point], 0, steps // 2)
                sweep.begin(point, place)
        sweep.poll()
        if sweep._polling is not None:
            sweep._polling.result()
        for number in range(points):
            point, place = f"p{number}", folder / f"p{number}"
            if point in journals:
                tell(journals[point], steps // 2, steps)
                journals[point].close()
                (place / "report.json").write_text("{}")
            sweep.end(point, place, "FINISHED")
        sweep.finish("FINISHED", {"points": points}, [folder / "environment.json"])


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, key: str = "k") -> tuple[Any, list[Any]]:
    """The sweep's run and its children."""
    experiment = client(uri).get_experiment_by_name("tests").experiment_id
    (parent,) = client(uri).search_runs([experiment], f"tags.`hasten.sweep` = '{key}'")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return parent, sorted(client(uri).search_runs([experiment], query), key=lambda run: run.info.run_name)


def check(uri: str, key: str, points: int, steps: int) -> None:
    """One parent with each point once, and in it each step once and in order."""
    parent, children = runs(uri, key)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "the sweep")
    assert parent.data.params == {"bits": "4"}
    assert [run.info.run_name for run in children] == [f"p{number}" for number in range(points)]
    for number, run in enumerate(children):
        assert run.info.status == "FINISHED"
        assert run.data.params == {"point": str(number)}
        assert [file.path for file in client(uri).list_artifacts(run.info.run_id)] == ["report.json"]
        history = client(uri).get_metric_history(run.info.run_id, "step")
        assert [(entry.step, entry.value) for entry in history] == [(step, step) for step in range(steps)]


def test_a_driver_that_dies_at_any_call_leaves_nothing_missing_or_twice(
    uri: str, tmp_path: Path, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    died = 0
    while True:
        key = f"k{died}"
        driver.left = died
        (tmp_path / key).mkdir()
        run_sweep(uri, tmp_path / key, key, points=1, steps=4)
        has_lived = driver.left > 0
        driver.left = float("inf")
        if has_lived:
            break
        run_sweep(uri, tmp_path / key, key, points=1, steps=4)
        check(uri, key, points=1, steps=4)
        died += 1
    check(uri, key, points=1, steps=4)
    # Of a point: run, parameters, two halves of the steps, report, status, mark; of the sweep: run and what it tells.
    assert died >= 7 + 5
    # The last one died when all was written.
    lost = [record for record in caplog.records if "nothing more is tracked" in record.getMessage()]
    assert len(lost) == died - 1


def test_a_sweep_of_many_points_outlives_driver_after_driver(uri: str, tmp_path: Path, driver: Driver) -> None:
    drivers = 0
    while driver.left == float("inf") or driver.left <= 0:
        drivers += 1
        driver.left = 13 * drivers
        run_sweep(uri, tmp_path, "k", points=8, steps=50)
    assert drivers > 3
    driver.left = float("inf")
    check(uri, "k", points=8, steps=50)


def test_what_running_points_tell_is_there_before_they_end(uri: str, tmp_path: Path) -> None:
    with tracker(uri, tmp_path) as sweep:
        journal = Journal(tmp_path / "p")
        sweep.begin("p", tmp_path / "p")
        seen = []
        for step in range(3):
            tell(journal, step, step + 1)
            sweep.poll()
            assert sweep._polling is not None
            sweep._polling.result()
            (child,) = runs(uri)[1]
            seen.append((child.info.status, child.data.metrics))
        assert seen == [("RUNNING", {"step": float(step)}) for step in range(3)]
        journal.close()
        sweep.end("p", tmp_path / "p", "FINISHED")
        sweep.finish("FINISHED", {}, [])


def test_a_failed_point_says_why_and_a_retry_takes_its_place(uri: str, tmp_path: Path) -> None:
    for ending, error in (("FAILED", "ValueError: no"), ("FAILED", "ValueError: again"), ("FINISHED", None)):
        with tracker(uri, tmp_path) as sweep:
            sweep.begin("p", tmp_path / "p")
            journal = Journal(tmp_path / "p")
            tell(journal, 0, 2)
            journal.close()
            sweep.end("p", tmp_path / "p", ending, error)
            sweep.finish(ending, {}, [])
        parent, (child,) = runs(uri)
        assert parent.info.status == child.info.status == ending
        assert child.data.tags.get("hasten.error") == error
        history = client(uri).get_metric_history(child.info.run_id, "step")
        assert [entry.step for entry in history] == [0, 1]


def test_a_point_that_died_before_it_said_anything_has_a_run(uri: str, tmp_path: Path) -> None:
    with tracker(uri, tmp_path) as sweep:
        sweep.begin("p", tmp_path / "p")
        sweep.poll()
        sweep.end("p", tmp_path / "p", "FAILED", "WorkerCrashedError: gone")
        sweep.finish("FAILED", {}, [])
    _, (child,) = runs(uri)
    assert (child.info.status, child.data.tags["hasten.error"]) == ("FAILED", "WorkerCrashedError: gone")


def test_a_point_that_starts_again_while_the_sweep_runs_is_there_once(uri: str, tmp_path: Path) -> None:
    with tracker(uri, tmp_path) as sweep:
        sweep.begin("p", tmp_path / "p")
        for steps in (3, 2):
            journal = Journal(tmp_path / "p")
            tell(journal, 0, steps)
            sweep.poll()
            assert sweep._polling is not None
            sweep._polling.result()
        journal.close()
        sweep.end("p", tmp_path / "p", "FINISHED")
        sweep.finish("FINISHED", {}, [])
    _, (child,) = runs(uri)
    assert [entry.step for entry in client(uri).get_metric_history(child.info.run_id, "step")] == [0, 1]


def test_points_that_are_stopped_and_a_sweep_that_fails_are_marked(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError), tracker(uri, tmp_path, "failing"):
        raise UserError("no")
    assert runs(uri, "failing")[0].info.status == "FAILED"
    with tracker(uri, tmp_path) as sweep:
        sweep.begin("p", tmp_path / "p")
        sweep.begin("not yet", tmp_path / "not yet")
        Journal(tmp_path / "p").close()
        sweep.poll()
        sweep.finish("KILLED", {}, [])
    parent, (child,) = runs(uri)
    assert parent.info.status == child.info.status == "KILLED"


def test_parameters_that_changed_since_do_not_end_the_tracking(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for values in ({"bits": "4"}, {"bits": "3", "seed": "1", "ignore": "x" * 7000}):
        with tracker(uri, tmp_path) as sweep:
            sweep.params(values)
            sweep.finish("FINISHED", {"points": 2}, [])
    parent, _ = runs(uri)
    assert parent.data.params == {"bits": "4", "seed": "1", "ignore": "x" * 6000}
    assert parent.data.metrics == {"points": 2}
    assert caplog.records == []


def test_two_sweeps_share_an_experiment(uri: str, tmp_path: Path) -> None:
    for key in ("a", "b"):
        (tmp_path / key).mkdir()
        run_sweep(uri, tmp_path / key, key, points=1, steps=2)
    for key in ("a", "b"):
        check(uri, key, points=1, steps=2)
