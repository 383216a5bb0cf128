"""The job on a tiny checkpoint, in this process; decode and cache use what it writes."""

import shutil
from contextlib import nullcontext

import pytest

from hasten.accel.cache.statistics import FOLDER, read_layers
from hasten.cluster.programs import cache_calibration
from hasten.jobs.cache.options import CacheConfig
from hasten.jobs.cache.run import cache_rows
from hasten.jobs.calibrate_cache import run as job
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.main import main
from hasten.jobs.decode.inputs import prepare
from hasten.jobs.decode.options import DecodeConfig
from tests.jobs.report import last_report

FILES = ["CSKV-key_rank=0.5-value_rank=0.5.safetensors", "KVQuant-sinks=1-bits=2-outliers=0.01.safetensors"]


@pytest.fixture
def model(source, folder):
    """A copy of the checkpoint."""
    return shutil.copytree(source, folder / "m")


@pytest.fixture
def calibrate(model, source):
    """Exit code of a quick run."""

    def call(**changes):
        options = {
            "method": "[kvquant:bits=2,cskv]",
            "model": model,
            "source": source.with_name("tokens.npy"),
            "sequences": 3,
            "sequence_length": 16,
            "shards": 3,
            "batch": 2,
        }
        return main(["calibrate_cache", *(f"{key}={value}" for key, value in (options | changes).items())])

    return call


@pytest.fixture
def tasks(monkeypatch):
    """The parts that were computed, in this process; after the second one the run is killed."""
    computed = []

    def in_turn(function, arguments, count, at_once, needs, batches):
        for number in range(count):
            if len(computed) == 2:
                computed.append("killed")
                raise KeyboardInterrupt
            computed.append(number)
            yield number, function(*arguments(number))

    monkeypatch.setattr(cache_calibration, "task_results", in_turn)
    monkeypatch.setattr(job, "cluster_session", lambda *_: nullcontext())
    return computed


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.ray
def test_one_and_two_workers_write_the_same_bytes_and_what_is_finished_stays(
    calibrate, model, folder, capsys, ray_session
):
    assert calibrate(workers=1, output=folder / "one") == 0
    report, _ = last_report(capsys)
    assert [row["method"] for row in report["statistics"]] == ["kvquant:bits=2", "cskv"]
    assert report["texts"]["calibration"]["sequences"] == 3
    assert calibrate(workers=2) == 0
    made = contents(model / FOLDER)
    assert list(made) == FILES
    assert contents(folder / "one") == made
    note = read_layers(model / FOLDER / FILES[1]).note
    assert (note["method"], note["settings"]["bits"], note["sequences"]) == ("KVQuant", 2, 3)


def test_a_killed_run_goes_on_with_the_missing_parts(calibrate, folder, tasks):
    out = folder / "out"
    assert calibrate(output=out) != 0
    assert len(contents(out / ".parts")) == 2
    assert not list(out.glob("*.safetensors"))
    assert calibrate(output=out) == 0
    assert tasks == [0, 1, "killed", 0]
    assert sorted(file.name for file in out.iterdir()) == FILES
    found = contents(out)
    assert calibrate(output=out) == 0
    assert tasks == [0, 1, "killed", 0]
    assert calibrate(output=out, overwrite="true") == 0
    assert tasks[4:] == [0, 1, 2]
    assert contents(out) == found


def test_decode_and_cache_find_the_statistics_beside_the_checkpoint(calibrate, model, source, folder, tasks, capsys):
    tasks.extend(["never killed"] * 3)
    assert calibrate() == 0
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": [5, 6, 7]}\n')
    own = model / FOLDER

    def decode(*words, target=model):
        given = [f"target={target}", "prompts=prompts.jsonl", "drafter=prompt_lookup", "run_dir=r", "max_new_tokens=9"]
        return prepare(compose("decode", DecodeConfig, [*given, *words])).spec.cache_statistics

    assert decode("cache=cskv") == own / FILES[0]
    assert decode("cache=cskv", "cache_statistics=prompt") is None
    assert decode("cache=kvquant", "cache.bits=2") == own / FILES[1]
    assert decode("cache=kvquant", "cache.bits=3") is None
    assert decode() is None
    assert decode("cache=cskv", f"cache_statistics={own}", target=source) == own / FILES[0]
    other = shutil.copytree(model, folder / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("}", " }", 1))
    for words in (["cache=cskv"], ["cache=cskv", f"cache_statistics={own}"]):
        with pytest.raises(ValueError, match=r"is of another model .* run hasten calibrate_cache for this one"):
            decode(*words, target=other)

    def rows(*words):
        config = compose("cache", CacheConfig, ["method=[snapkv,cskv,kvquant]", *words])
        return [row.statistics for _, row in cache_rows(config, model)]

    assert rows() == [None, None, own / FILES[0], None]
    assert rows("statistics=prompt") == [None] * 4
    with pytest.raises(ValueError, match=r"KVQuant.* does not exist: hasten calibrate_cache"):
        rows(f"statistics={own}")


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"method": "[snapkv]"},
            "method=snapkv has no calibrated statistics: those that have are cskv, double_sparsity",
        ),
        ({"method": "[kvquant:bits=5]"}, "cache.bits=5"),
        ({"source": "missing.npy"}, "missing.npy"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(calibrate, model, folder, capsys, changes, wrong):
    assert calibrate(**changes) == 2
    assert wrong in capsys.readouterr().err
    assert list(folder.iterdir()) == [model]
