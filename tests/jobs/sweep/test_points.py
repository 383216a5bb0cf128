"""What tells points from each other, where each puts what it makes, and what it takes of a cluster."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.programs.sweep_points import is_finished
from hasten.jobs.cli.compose import compose
from hasten.jobs.descriptors.registry import job_of, jobs
from hasten.jobs.sweep import points as sweep_points
from hasten.jobs.sweep.dimensions import read
from hasten.jobs.sweep.points import Points


def points(job="compress", *fixed, folder=Path("/sweep")):
    return Points(jobs()[job], fixed, folder)


def fingerprint(*fixed, job="compress"):
    return points(job, *fixed).make({}).fingerprint


@pytest.fixture(scope="module")
def usual():
    return fingerprint()


@pytest.mark.parametrize(
    "word", ["bits=3", "calibration.sequences=4", "quantizer=round_to_nearest", "quantizer.damping=0.1", "model=x"]
)
def test_any_option_makes_another_fingerprint(usual, word):
    assert fingerprint(word) != usual


def test_the_job_and_the_benchmark_make_another_fingerprint():
    wait = job_of("bench", "wait")
    found = [Points(job, [], Path("/sweep")).make({}).fingerprint for job in (wait, replace(wait, variant="other"))]
    assert found[0] != found[1]
    replay, made = job_of("replay"), points("replay").make({})
    assert sweep_points.fingerprint(replay, made.config) == made.fingerprint
    assert sweep_points.fingerprint(replace(replay, name="decode"), made.config) != made.fingerprint


def test_where_and_how_a_run_is_kept_does_not_change_the_fingerprint(usual):
    words = [
        "run_dir=x",
        "cache_folder=x",
        "tracking.uri=sqlite:///x.db",
        "tracking.name=x",
        "address=auto",
        "overwrite=true",
    ]
    assert fingerprint(*words, "output=x/{point}") == usual


def test_the_sweeps_folder_does_not_change_a_points_name():
    names = [points(folder=Path(folder)).make({"bits": "3"}).name for folder in ("/a", "/b")]
    assert names[0] == names[1]


@pytest.mark.parametrize("option", ["model={}", "calibration.source={}/text.txt"])
def test_the_content_of_an_input_counts_and_not_its_time(tmp_path, option):
    word, file = option.format(tmp_path), tmp_path / "text.txt"
    file.write_text("one")
    before = fingerprint(word)
    os.utime(file, (1, 1))
    assert fingerprint(word) == before
    file.write_text("two")
    os.utime(file, (1, 1))
    assert fingerprint(word) != before


def test_a_large_file_is_told_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hasten.jobs.sweep.points._HASHED_BYTES", 2)
    file = tmp_path / "model.safetensors"
    file.write_text("one")
    os.utime(file, (1, 1))
    before = fingerprint(f"model={tmp_path}")
    os.utime(file, (2, 2))
    assert fingerprint(f"model={tmp_path}") != before


def test_a_file_that_runs_change_themselves_does_not_change_the_fingerprint(tmp_path):
    memory = tmp_path / "memory"
    found = []
    for text in ("one", "two"):
        memory.write_text(text)
        found.append(fingerprint(f"memory={memory}{{point}}", job="decode"))
    assert found[0] == found[1]


def test_a_file_that_points_change_is_no_other_points():
    with pytest.raises(UserError, match=r"memory=m would be every point's: leave it out, or write memory=m/\{point\}"):
        points("decode", "memory=m").make({"seed": "1"})
    made = points("decode", "memory=m/{point}")
    one, two = (made.make({"seed": text}) for text in ("1", "2"))
    assert [each.config.memory for each in (one, two)] == [f"m/{one.name}", f"m/{two.name}"]


def test_a_missing_input_path_is_named(tmp_path):
    made = points("evaluate")
    made.check_inputs([made.make({"model": "embedded:target"}), made.make({"model": str(tmp_path)})])
    with pytest.raises(UserError, match=rf"model={tmp_path}/none does not exist"):
        made.check_inputs([made.make({"model": f"{tmp_path}/none"})])


def test_a_point_that_sends_its_output_is_finished_when_that_is_sent(tmp_path):
    made = points("compress", "output=memory://bucket/{point}")
    assert made.work(made.make({"bits": "3"})).sends
    assert not points("compress").work(points("compress").make({"bits": "3"})).sends
    (tmp_path / "report.json").write_text('{"metrics": {}}')
    (tmp_path / "point.json").write_text('{"status": "running"}')
    assert is_finished(tmp_path, sends=False)
    assert not is_finished(tmp_path, sends=True)
    (tmp_path / "point.json").write_text('{"status": "finished"}')
    assert is_finished(tmp_path, sends=True)


def test_names_can_be_folders_and_are_told_apart_where_they_are_cut():
    made = points("evaluate")
    long = [made.make({"model": f"/{'models ü𠀀:*' * 30}/{letter}"}) for letter in "ab"]
    assert long[0].name != long[1].name
    for point in [*long, made.make({"tasks": '["a/b",c d]'}), made.make({"original": "../.."})]:
        assert Path(point.config.run_dir) == Path("/sweep/points", point.name)
        assert not set(point.name) & set("/\\: *?\"'<>|[]")
        assert len(point.name.encode()) < 100
        assert point.name not in (".", "..")
    short = made.make({"batch": "2", "dtype": "float32"})
    assert short.name == f"batch=2,dtype=float32-{short.fingerprint[:8]}"


def test_a_wrong_value_is_named_before_anything_runs():
    with pytest.raises(UserError, match="bits=9 is wrong: expected a whole number from 2 to 8"):
        points().make({"bits": "9"})


@pytest.mark.parametrize("job", ["compress", "search", "levels", "pretrain"])
def test_outputs_of_a_point_are_in_its_folder(job):
    point = points(job).make({"seed": "3"})
    assert point.config.output == f"/sweep/points/{point.name}/output"


def test_null_as_output_is_the_points_folder():
    point = points("compress", "output=null").make({"seed": "3"})
    assert point.config.output == f"/sweep/points/{point.name}/output"


@pytest.mark.parametrize("job", ["decode", "train_drafter"])
def test_a_job_whose_results_lie_in_its_run_folder_keeps_null(job):
    point = points(job).make({"seed": "3"})
    assert point.config.output is None
    assert point.config.run_dir == f"/sweep/points/{point.name}"


def test_one_output_for_all_points_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"output=out/ would be every point's.*output=out/\{point\}"):
        points("compress", "output=out/").make({"bits": "3"})


def test_the_points_name_replaces_its_mark_in_output():
    point = points("compress", "output=out/{point}/model").make({"bits": "3"})
    assert point.config.output == f"out/{point.name}/model"


def test_outputs_may_be_swept_but_not_shared():
    made = points()
    assert [made.make({"output": text, "bits": "3"}).config.output for text in ("a", "b")] == ["a", "b"]
    with pytest.raises(UserError, match=r"output=a would be several points'.*output=a/\{point\}"):
        made.make({"output": "a", "bits": "2"})


@pytest.mark.parametrize(
    ("job", "words", "expected"),
    [
        ("compress", ("workers=3", "threads=2"), (0.0, 0.0, 2, ({"CPU": 2.0, "GPU": 0.0},) * 3)),
        ("decode", ("workers=1",), (0.0, 0.0, 1, ({"CPU": 1.0, "GPU": 0.0},))),
        ("bench", ("threads=3",), (3.0, 0.0, 3, ())),
        ("replay", ("threads=2",), (2.0, 0.0, 2, ())),
        ("pretrain", ("workers=2", "threads=3"), (6.0, 0.0, 3, ())),
    ],
)
def test_a_job_takes_threads_for_itself_or_for_each_of_its_workers(job, words, expected, monkeypatch):
    monkeypatch.setattr("hasten.jobs.common.arithmetic.resolve_device", lambda name: "cpu")
    assert jobs()[job].needs_of(points(job, *words).make({}).config) == expected


def test_each_worker_and_each_job_that_computes_itself_takes_a_gpu(monkeypatch):
    monkeypatch.setattr("hasten.jobs.common.arithmetic.resolve_device", lambda name: "cuda")
    assert jobs()["compress"].needs_of(points().make({}).config)[3] == ({"CPU": 1.0, "GPU": 1.0},) * 2
    assert jobs()["replay"].needs_of(points("replay").make({}).config)[:2] == (1.0, 1.0)


def test_a_points_work_knows_its_folder_values_and_needs():
    point = points("compress", "workers=2").make({"bits": "3"})
    work = points("compress", "workers=2").work(point)
    assert (work.name, work.folder) == (point.name, Path("/sweep/points", point.name))
    assert work.facts == {"values": {"bits": "3"}, "fingerprint": point.fingerprint}
    assert work.needs == [{"CPU": 1.0}, {"CPU": 1.0}]


@pytest.mark.parametrize("text", ["'a,b'", "\"'a'\"", r"'it\'s'"])
def test_a_quoted_value_of_a_sweep_is_the_same_as_that_of_a_run(text):
    words = read([f"model={text}", f"tracking.name={text},other"], [])
    [dimension] = words.dimensions
    made = Points(jobs()["compress"], words.fixed, Path("/sweep")).make({dimension.key: dimension.values[0]}).config
    run = compose("compress", jobs()["compress"].options, [f"model={text}", f"tracking.name={text}"])
    assert (made.model, made.tracking.name) == (run.model, run.tracking.name)
