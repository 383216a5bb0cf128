"""Rows of a sweep's report, its table and its list of failures."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from hasten.cluster.programs.sweep_points import metrics_of
from hasten.jobs.sweep.points import Point
from hasten.jobs.sweep.results import Row, failures, table

FOLDER = Path("/sweep")


def row(name, status="finished", values=None, **given):
    config = SimpleNamespace(run_dir=f"/sweep/points/{name}")
    return Row(Point(name, f"f-{name}", values or {"bits": name}, config), status, **given)


ROWS = [
    row("2", metrics={"kl": 0.25, "bytes": 200}, seconds=1.0),
    row("3", metrics={"kl": 0.125, "bytes": 300}, seconds=2.25),
    row("4", "failed", error={"type": "UserError", "message": "no memory"}, metrics={"kl": 0.0}, seconds=1.0),
    row("5", metrics={"kl": None, "bytes": 500}, seconds=3.0),
    row("6", "waiting"),
]


def test_the_table_has_finished_points_only_the_best_first_and_those_without_figures_last():
    assert table(ROWS, ["kl", "bytes", "absent"], ascending=True) == [
        "bits     kl  bytes  seconds",
        "   3  0.125    300      2.2",
        "   2   0.25    200      1.0",
        "   5           500      3.0",
    ]


def test_more_is_first_where_more_is_better():
    lines = table(ROWS, ["kl"], ascending=False)
    assert [line.split()[0] for line in lines] == ["bits", "2", "3", "5"]


def test_without_a_metric_that_is_known_the_order_is_kept():
    assert [line.split()[0] for line in table(ROWS, ["absent"], ascending=True)] == ["bits", "2", "3", "5"]


def test_without_finished_points_there_is_no_table():
    assert table([ROWS[2], ROWS[4]], ["kl"], ascending=True) == []


@dataclass
class Compress:
    """Options of a job that measures quality."""

    model: str
    evaluation: dict = field(default_factory=lambda: {"source": "library"})
    run_dir: str = "/sweep/points/x"


def test_points_of_different_models_are_not_ranked_among_each_other():
    figures = {("/a", "2"): 0.5, ("/b", "2"): 0.002, ("/a", "4"): 0.1, ("/b", "4"): 0.001}
    rows = [
        Row(
            Point(f"{model}{bits}", "f", {"model": model, "bits": bits}, Compress(model)),
            "finished",
            metrics={"kl_divergence": divergence},
            seconds=1.0,
        )
        for (model, bits), divergence in figures.items()
    ]
    lines = table(rows, ["kl_divergence"], ascending=True)
    assert [line.split()[:3] for line in lines] == [
        ["original=/a:"],
        ["model", "bits", "kl_divergence"],
        ["/a", "4", "0.1"],
        ["/a", "2", "0.5"],
        ["original=/b:"],
        ["model", "bits", "kl_divergence"],
        ["/b", "4", "0.001"],
        ["/b", "2", "0.002"],
    ]
    assert table(rows, ["bytes"], ascending=True)[0].split() == ["model", "bits", "seconds"]


def test_points_are_compared_by_the_originals_and_texts_of_their_reports(tmp_path):
    def measured(name, divergence, text):
        report = {
            "job": "evaluate",
            "config": {"model": name, "original": "/m", "evaluation": {"source": None}},
            "metrics": {"kl_divergence": divergence},
            "original": {"fingerprint": "m"},
            "tokenizer": {"fingerprint": "t"},
            "texts": {"evaluation": {"fingerprint": text}},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        config = Compress(name, {"source": None}, str(tmp_path / name))
        return Row(Point(name, "f", {"model": name}, config), "finished", metrics=report["metrics"], seconds=1.0)

    copies = [measured("w3", 0.5, "a"), measured("w4", 0.25, "a")]
    assert [line.split()[0] for line in table(copies, ["kl_divergence"], ascending=True)] == ["model", "w4", "w3"]
    # Such as another bos, which changes the text.
    lines = table([*copies, measured("w5", 0.125, "b")], ["kl_divergence"], ascending=True)
    assert [line.split()[0] for line in lines] == [
        "text.fingerprint=a:",
        "model",
        "w4",
        "w3",
        "text.fingerprint=b:",
        "model",
        "w5",
    ]


def test_failures_name_the_error_and_the_file_of_the_output():
    assert failures(ROWS) == ["  4: UserError: no memory (/sweep/points/4/output.txt)"]


def test_a_line_has_values_and_figures_or_the_error():
    assert ROWS[1].line(["kl", "bytes", "absent"]) == "bits=3: kl=0.125, bytes=300, 2.2 s"
    assert ROWS[2].line(["kl"]) == "bits=4: failed: UserError: no memory"


def test_a_row_of_the_report_holds_numbers_as_numbers():
    values = {"bits": "3", "lr": "1e-3", "model": "a/b", "group": "null", "high": "inf", "flag": "true"}
    found = row("x", metrics={"kl": 0.5}, seconds=1.5, values=values).plain(FOLDER)
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "name": "x",
        "folder": "points/x",
        "values": {"bits": 3, "lr": 0.001, "model": "a/b", "group": "null", "high": "inf", "flag": "true"},
        "fingerprint": "f-x",
        "status": "finished",
        "seconds": 1.5,
        "metrics": {"kl": 0.5},
        "error": None,
    }


def test_metrics_are_those_of_a_run_folders_report(tmp_path):
    assert metrics_of(tmp_path) == {}
    (tmp_path / "report.json").write_text('{"job": "x", "metrics": {"a": 1}}')
    assert metrics_of(tmp_path) == {"a": 1}
