"""The whole job on a tiny checkpoint, in this process, on the session's Ray."""

import logging
from types import SimpleNamespace

import pytest

from hasten.accel.outputs.resumable import ResumableFolder
from hasten.jobs.cli.main import main
from hasten.jobs.levels.run import DatabaseBuild
from tests.compression.local import contents
from tests.compression.other_run import held
from tests.jobs.report import last_report


def levels(source, **changes):
    """Exit code of a quick run into `levels`."""
    options = {
        "model": source,
        "output": "levels",
        "bits": "[2,3,5]",
        "group_sizes": "[32]",
        "workers": 2,
        "calibration.source": source.parent / "tokens.npy",
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
    }
    return main(["levels", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_a_database_is_made_reported_and_finished_by_the_same_command(source, folder, capsys, ray_session):
    assert levels(source) == 0
    report, _ = last_report(capsys)
    assert report["job"] == "levels"
    assert report["levels"] == ["w2g32", "w3g32", "w5g32"]
    assert len(report["layers"]) == 3 * 2 * 7
    metrics = report["metrics"]
    assert metrics["bytes"] == sum(file.stat().st_size for file in (folder / "levels/layers").iterdir())
    assert metrics["bytes_per_weight"] == pytest.approx(
        metrics["bytes"] / sum(r["weights"] for r in report["layers"]) * 3
    )
    whole = contents(folder / "levels")

    (folder / "levels/database.json").unlink()
    (folder / "levels/layers/model.layers.1.mlp.down_proj.safetensors").unlink()
    assert levels(source, workers=1) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["blocks_resumed"] == 1
    assert contents(folder / "levels") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": "[2,2]"}, "bits=[2, 2] is wrong: expected different values"),
        ({"bits": "[1,4]"}, "bits=1 is out of range: 2 to 8"),
        ({"bits": "[2,4]"}, "reference=3 is none of bits=2, 4"),
        ({"group_sizes": "[48]"}, "group_size=48 does not divide the 64 columns of model.layers.0.self_attn.q_proj"),
    ],
)
def test_levels_that_make_no_sense_are_refused_and_nothing_is_written(changes, message, source, folder, capsys):
    assert levels(source, **changes) == 2
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_second_run_waits_for_the_one_that_makes_the_same_database_and_holds_nothing(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "hasten.jobs.levels.run")
    monkeypatch.setattr("hasten.jobs.levels.run._SECONDS_BETWEEN_TRIES", 0.01)
    building = object.__new__(DatabaseBuild)
    building.database = ResumableFolder(tmp_path / "levels", tmp_path)
    paused = []
    with held(tmp_path / "levels/.hasten/lock") as other:

        def pause():
            paused.append(len(paused))
            if len(paused) == 3:
                other.kill()

        building._pass = SimpleNamespace(pause=pause)
        building._wait()
    assert len(paused) >= 3
    assert caplog.messages == [f"another run builds levels={tmp_path / 'levels'}: waiting for it"]
    building.database.release()
