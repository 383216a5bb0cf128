import json

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.report.reading import Failure, Objective, read
from tests.jobs.reports import folders


def entries(*paths):
    return [entry for source in read(paths) for entry in source.entries]


@pytest.mark.parametrize("named", ["run", "run/report.json"])
def test_a_run_is_named_by_its_folder_or_by_its_report(folder, named):
    folders.compress(folder / "run", 3, "gptq", 0.2, 300)
    (entry,) = entries(folder / named)
    assert (entry.job, entry.name, entry.folder, entry.status) == ("compress", "run", folder / "run", "finished")
    assert entry.metrics["kl_divergence"] == 0.2
    assert entry.config["bits"] == 3
    assert len(entry.report["layers"]) == 4


def test_a_sweep_has_an_entry_for_every_point(folder):
    (source,) = read([folders.sweep(folder / "sweep")])
    assert source.varied == ("bits", "quantizer")
    assert source.objectives == (Objective("kl_divergence", "minimize"), Objective("bytes", "minimize"))
    assert [entry.status for entry in source.entries] == ["finished"] * 4 + ["failed"]
    assert source.entries[0].values == {"bits": 2, "quantizer": "gptq"}
    assert len(source.entries[0].report["layers"]) == 4
    assert source.entries[4].failure == Failure("ActorDiedError", "out of memory")
    assert source.entries[4].folder == folder / "sweep/points/gptq-8"


def test_a_sweep_that_has_not_ended_is_read_from_its_points(folder):
    (source,) = read([folders.sweep(folder / "sweep", ended=False)])
    found = {entry.name: entry.status for entry in source.entries}
    assert found["gptq-4"] == "finished"
    assert (found["gptq-8"], found["a-8"], found["b-8"]) == ("failed", "running", "waiting")
    assert source.varied == ("bits", "quantizer")
    assert source.objectives[1] == Objective("bytes", "minimize")


def test_points_that_a_killed_sweep_did_not_report_any_more_are_read_from_their_folders(folder):
    folders.sweep(folder / "sweep")
    report = json.loads((folder / "sweep/report.json").read_text())
    known = [row for row in report["points"] if row["name"] != "gptq-8"]
    known[0] |= {"status": "running", "metrics": {}, "seconds": None}
    folders.write(folder / "sweep", report | {"points": known})
    found = {entry.name: entry for entry in entries(folder / "sweep")}
    # It has its own report, which is written last; the other has said that it failed.
    assert (found["gptq-2"].status, found["gptq-2"].metrics["kl_divergence"]) == ("finished", 0.8)
    assert (found["gptq-8"].status, found["gptq-8"].failure.type) == ("failed", "ActorDiedError")


def test_a_point_without_its_own_file_counts_by_its_report(folder):
    folders.sweep(folder / "sweep", ended=False)
    (folder / "sweep/points/gptq-4/point.json").unlink()
    (folder / "sweep/points/a-8/point.json").unlink()
    found = {entry.name: entry for entry in entries(folder / "sweep")}
    assert (found["gptq-4"].status, found["gptq-4"].metrics["kl_divergence"]) == ("finished", 0.05)
    assert found["a-8"].status == "unfinished"


def test_a_damaged_report_of_a_point_does_not_hide_the_others(folder):
    folders.sweep(folder / "sweep")
    path = folder / "sweep/points/gptq-2/report.json"
    path.write_text(path.read_text()[:100])
    found = {entry.name: entry for entry in entries(folder / "sweep")}
    assert found["gptq-2"].status == "failed"
    assert found["gptq-2"].failure.type == "damaged"
    assert str(path) in found["gptq-2"].failure.message
    assert found["gptq-4"].finished


def test_a_run_that_failed_tells_its_last_exception(folder):
    folders.compress(folder / "good", 3, "gptq", 0.2, 300)
    _, entry = entries(folder / "good", folders.failed(folder / "bad", "no room: give workers=1"))
    assert (entry.status, entry.failure) == ("failed", Failure("Lost", "no room: give workers=1"))
    assert entry.config["bits"] == 5


def test_a_run_that_was_started_again_after_its_failure_is_unfinished(folder):
    folders.compress(folder / "good", 3, "gptq", 0.2, 300)
    log = folders.failed(folder / "again", "x") / "hasten.log"
    log.write_text(log.read_text() + "2026-11-21 13:05:00,003 INFO hasten.jobs.common.run: starting\n")
    _, entry = entries(folder / "good", folder / "again")
    assert (entry.status, entry.failure) == ("unfinished", None)


def test_each_budget_of_a_search_is_an_entry_with_its_own_figures(folder):
    low, high = entries(folders.search(folder / "search"))
    assert (low.values, high.values) == ({"budget": 2.5}, {"budget": 3.0})
    assert (low.metrics["bytes"], high.metrics["bytes"]) == (2500, 3000)
    assert [row["bits_per_weight"] for row in high.report["layers"]] == [3.0, 3.0, 4.0, 4.0]


def test_a_single_budget_keeps_the_name_of_its_run_and_gives_its_figures(folder):
    row = {"budget": 8, "tokens_per_step": 1.5, "acceptance_per_position": [0.5]}
    report = {"job": "replay", "config": {"budgets": [8]}, "metrics": {"seconds": 1.0}, "budgets": [row]}
    (entry,) = entries(folders.write(folder / "replay", report))
    assert (entry.name, entry.values, entry.metrics["tokens_per_step"]) == ("replay", {}, 1.5)
    assert entry.report["acceptance_per_position"] == [0.5]


WRONG = {
    "missing": "missing does not exist: expected the folder of a run or of a sweep, or its report.json",
    "note.txt": "note.txt is a file: expected the folder of a run",
    "empty": "empty is neither run nor sweep, as it has no report.json, config.yaml or sweep.json: expected",
    "runs": "; there are runs in it, such as",
    "cut": "cut/report.json is damaged: expected whole JSON, but line 1 has",
    "list": "list/report.json is no report of a run or sweep: expected an object with the keys job and metrics",
    "other": "other/report.json is no report of a run or sweep: expected the keys job and metrics in it",
    "pointless": "pointless/report.json is no report of a sweep: expected points, each with its folder",
    "failed": "failed: nothing has finished yet (1 failed; the first failure: Lost: gone): expected at least one",
    "waiting": "waiting: nothing has finished yet (1 waiting): expected at least one finished run or point",
    "started": "started: nothing has finished yet (it has no points): expected at least one finished run or point",
}


@pytest.mark.parametrize("named", WRONG)
def test_a_folder_without_a_run_is_one_line_with_what_was_expected(folder, named):
    (folder / "note.txt").write_text("a note")
    (folder / "empty").mkdir()
    folders.compress(folder / "runs" / "one", 3, "gptq", 0.2, 300)
    report = (folder / "runs/one/report.json").read_text()
    for name, text in {"cut": report[:200], "list": "[]", "other": '{"name": "hasten"}'}.items():
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(text)
    folders.write(folder / "pointless", {"job": "sweep", "metrics": {}})
    folders.failed(folder / "failed", "gone")
    (folder / "waiting/points/0").mkdir(parents=True)
    (folder / "waiting/points/0/point.json").write_text(json.dumps({"status": "waiting"}))
    (folder / "started").mkdir()
    (folder / "started/sweep.json").write_text("{}")
    with pytest.raises(UserError) as refusal:
        read([folder / named])
    assert WRONG[named] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_same_run_twice_is_refused(folder):
    run = folders.compress(folder / "run", 3, "gptq", 0.2, 300)
    with pytest.raises(UserError, match="is given twice"):
        read([run, run / "report.json"])
