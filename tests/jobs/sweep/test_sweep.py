"""Sweeps as a user runs them: `hasten bench wait --multirun`, whose points take no time of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import hasten
from hasten.cluster.tracking import store
from hasten.jobs.cli.main import main

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(*words):
    """Exit code of a sweep of `bench wait` in ./sweep, which notes in ./done who came to the end."""
    return main(["bench", "wait", "--multirun", "run_dir=sweep", f"done={Path('done').absolute()}", *words])


def report(folder="sweep"):
    return json.loads(Path(folder, "report.json").read_text())


def done():
    return sorted(int(line) for line in Path("done").read_text().split())


def finished_points():
    """Numbers of the points that are recorded as finished."""
    records = {path.parent.name: path.read_text() for path in Path("sweep", "points").glob("*/point.json")}
    names = [name for name, text in records.items() if json.loads(text).get("status") == "finished"]
    return [int(re.match(r"point=(\d+)", name)[1]) for name in names]


def runs(parent=None):
    """Children of the sweep in MLflow that were not deleted, by name."""
    from mlflow import MlflowClient

    client = MlflowClient(store.default_uri())
    experiment = client.get_experiment_by_name("hasten").experiment_id
    found = client.search_runs([experiment])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == len(found) - 1
    return client, parents[0], children


def test_every_point_of_the_grid_runs_once_and_is_a_child_of_one_run(here, capsys):
    assert sweep("point=range(0,4)", "wait_seconds=0.1", "steps=3") == 0
    assert done() == [0, 1, 2, 3]
    found = report()
    assert found["job"] == "sweep"
    assert found["sweep_of"] == "wait"
    assert found["varied"] == ["point"]
    assert [row["values"] for row in found["points"]] == [{"point": number} for number in range(4)]
    assert {row["status"] for row in found["points"]} == {"finished"}
    assert found["metrics"]["points"] == found["metrics"]["finished"] == 4
    client, parent, children = runs()
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["finished"] == 4
    assert sorted(run.data.params["point"] for run in children) == ["0", "1", "2", "3"]
    for run in children:
        assert run.info.status == "FINISHED"
        assert [entry.value for entry in client.get_metric_history(run.info.run_id, "square")] == [0, 1, 4]
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"report.json", "config.yaml", "hasten.log", "environment.json"} <= names
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"report: {here / 'sweep' / 'report.json'}"
    for row in found["points"]:
        assert json.loads((here / "sweep" / row["folder"] / "report.json").read_text())["metrics"] == row["metrics"]


def test_a_point_that_fails_stops_no_other_and_is_tried_again_by_the_same_command(here, capsys):
    words = ("point=0,1", "fail=true,false", "wait_seconds=0")
    assert sweep(*words) == 1
    out = capsys.readouterr().out
    assert "2 of 4 points failed:" in out
    assert "UserError: fail=true was asked for" in out
    assert done() == [0, 1]
    states = {(row["values"]["point"], row["values"]["fail"]): row["status"] for row in report()["points"]}
    assert states == {(0, "true"): "failed", (0, "false"): "finished", (1, "true"): "failed", (1, "false"): "finished"}
    assert sweep(*words) == 1
    assert done() == [0, 1]
    attempts = [json.loads(path.read_text())["attempts"] for path in sorted(here.glob("sweep/points/*/point.json"))]
    assert sorted(attempts) == [1, 1, 2, 2]
    _, parent, children = runs()
    assert parent.info.status == "FAILED"
    assert sorted(run.info.status for run in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]


def test_a_larger_grid_reuses_the_points_of_a_smaller_one(here):
    assert sweep("point=0,1", "wait_seconds=0") == 0
    assert sweep("point=range(0,4)", "wait_seconds=0") == 0
    assert done() == [0, 1, 2, 3]
    assert report()["metrics"]["repeated"] == 2
    _, _, children = runs()
    assert len(children) == 4


def test_the_same_words_have_the_same_folder_by_default(here, capsys):
    words = ["bench", "wait", "--multirun", "point=1,2", "wait_seconds=0"]
    assert main(words) == main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("report: ")]
    assert lines[0] == lines[1]
    assert report(Path(lines[0].removeprefix("report: ")).parent)["metrics"]["repeated"] == 2


def test_a_killed_process_costs_only_its_own_attempt(here):
    """SIGKILL to the process of a point that runs: Ray starts it again, and it comes to its end once."""

    def kill():
        for _ in range(600):
            for path in here.glob("sweep/points/*/point.json"):
                facts = json.loads(path.read_text())
                if facts.get("status") == "running":
                    os.kill(facts["process"], signal.SIGKILL)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert sweep("point=range(0,4)", "wait_seconds=0.5", "steps=5") == 0
    killer.join()
    assert done() == [0, 1, 2, 3]
    attempts = [json.loads(path.read_text())["attempts"] for path in here.glob("sweep/points/*/point.json")]
    assert sum(attempts) > 4
    client, _, children = runs()
    assert len(children) == 4
    for run in children:
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, "step")]
        assert steps == list(range(5))


def test_a_new_driver_resumes_the_sweep_of_a_killed_one(here):
    words = ["bench", "wait", "--multirun", "run_dir=sweep", f"done={here / 'done'}", "point=range(0,6)", "steps=4"]
    command = [sys.executable, "-m", "hasten", *words, "wait_seconds=0.5", "sweep.cpus=2"]
    driver = subprocess.Popen(
        command, cwd=here, env={**os.environ, "PYTHONPATH": str(Path(hasten.__file__).parents[1])}
    )
    while not (finished := finished_points()):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert main([*words, "wait_seconds=0.5", "sweep.cpus=2"]) == 0
    # A point that was killed between its last step and the record of its end runs again.
    assert set(done()) == set(range(6))
    assert [done().count(number) for number in finished] == [1] * len(finished)
    assert report()["metrics"]["repeated"] >= len(finished)
    client, parent, children = runs()
    assert parent.info.status == "FINISHED"
    assert sorted(run.data.params["point"] for run in children) == [str(number) for number in range(6)]
    for run in children:
        assert [entry.step for entry in client.get_metric_history(run.info.run_id, "step")] == list(range(4))


def test_interrupted_once_it_lets_points_finish_and_resumes_later(here):
    def interrupt():
        while not list(here.glob("sweep/points/*/point.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    words = ("point=range(0,6)", "wait_seconds=0.5", "sweep.at_once=2")
    assert sweep(*words) == 130
    sender.join()
    first = done()
    assert 0 < len(first) < 6
    assert {row["status"] for row in report()["points"]} == {"finished", "waiting"}
    _, parent, _ = runs()
    assert parent.info.status == "KILLED"
    assert sweep(*words) == 0
    assert done() == list(range(6))
    _, parent, children = runs()
    assert (parent.info.status, len(children)) == ("FINISHED", 6)


def test_interrupted_twice_it_stops_and_resumes_later(here):
    ended = threading.Event()

    def interrupt():
        while not list(here.glob("sweep/points/*/point.json")):
            time.sleep(0.02)
        warned = 0
        while warned < 2 and not ended.wait(0.6):  # signals that come together count as one
            os.kill(os.getpid(), signal.SIGINT)
            warned += 1

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    words = ("point=range(0,2)", "wait_seconds=4", "sweep.at_once=1")
    code = sweep(*words)
    ended.set()
    sender.join()
    assert code == 130
    assert {row["status"] for row in report()["points"]} == {"stopped", "waiting"}
    assert sweep(*words) == 0
    assert done() == [0, 1]
    assert len(runs()[2]) == 2


def test_optuna_chooses_points_between_bounds_and_its_study_is_kept(here):
    words = ("wait_seconds=interval(0,0.2)", "point=range(0,3)", "sweep.metrics=[seconds]", "sweep.sampler=random")
    assert sweep(*words, "sweep.trials=4") == 0
    assert report()["metrics"]["finished"] == 4
    assert report()["objectives"] == [{"metric": "seconds", "direction": "minimize"}]
    assert all(0 <= row["values"]["wait_seconds"] <= 0.2 for row in report()["points"])
    import optuna

    def trials():
        return optuna.load_study(study_name="sweep", storage=f"sqlite:///{here}/sweep/study.db").trials

    assert [len(trial.values) for trial in trials()] == [1] * 4
    assert sweep(*words, "sweep.trials=6") == 0
    assert len(trials()) == 6
    assert len(done()) == 6
    assert len(runs()[2]) == 6


WRONG = {
    "point=a,b": "point=a is wrong: expected a whole number, 0 or more",
    "pont=1,2": "unknown option 'pont': did you mean point?",
    "point=1,2 sweep.trails=3": "unknown option 'sweep.trails': did you mean sweep.trials?",
    "point=1,2 sweep.sampler=tpe": "sweep.metrics is needed",
    "point=interval(0,1) sweep.sampler=grid": "an interval has infinitely many points",
    "point=1,2 done=a,b run_dir=x,y": "run_dir applies to the whole sweep: give it one value",
    "point=range(3,3)": "point=range(3,3) is empty",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_in_any_point_is_named_before_one_runs(here, capsys, words):
    assert main(["bench", "wait", "--multirun", *words.split()]) == 2
    error = capsys.readouterr().err
    assert WRONG[words] in error
    assert error.count("\n") == 1
    assert list(here.iterdir()) == []
