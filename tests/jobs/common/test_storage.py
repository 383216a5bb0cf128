"""Jobs whose options are URIs, on fsspec's store in memory: what they read, make, name and leave behind."""

import json
import re
import time
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.storage.naming import as_given
from hasten.jobs.cli.compose import compose
from hasten.jobs.common import storage
from hasten.jobs.common.logs import log_to_terminal
from hasten.jobs.common.run import start
from hasten.jobs.common.storage import local_paths
from hasten.jobs.compress import run as compress
from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.evaluate import run as evaluate
from hasten.jobs.evaluate.options import EvaluateConfig
from tests.compression.local import contents
from tests.models import tiny

BLOCKS = 3
OURS = {".hasten/source.json", ".hasten/calibration.json"}  # name where model and text were read from


@pytest.fixture(autouse=True)
def store(monkeypatch, folder):
    """The store in memory, empty; the cache is a new folder, too."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    monkeypatch.setenv("HASTEN_CACHE", str(folder / "cache"))
    return fsspec.filesystem("memory")


def stored(store, path):
    return {name.removeprefix(f"{path}/"): store.cat_file(name) for name in store.find(path)}


def run(source, **changes):
    """A quick compression as the command line runs it; the path of the report as it is printed."""
    options = {
        "model": source,
        "run_dir": "runs/compress/here",
        "group_size": 32,
        "workers": 1,
        "calibration.source": source.parent / "tokens.npy",
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
        "evaluation.sequences": 0,
    }
    config = compose("compress", CompressConfig, [f"{key}={value}" for key, value in (options | changes).items()])
    log_to_terminal()
    with local_paths(CompressConfig, config) as local:
        return as_given(str(compress.run(local)))


@pytest.fixture
def sent(source, store):
    """The checkpoint and its tokens in the store."""
    store.put(str(source), "/models/tiny llama", recursive=True)
    store.put_file(str(source.parent / "tokens.npy"), "/data/tokens.npy")
    return {"model": "memory://models/tiny llama", "calibration.source": "memory://data/tokens.npy"}


@pytest.mark.ray
def test_a_compression_by_uri_has_the_bytes_of_a_local_one_and_names_uris(
    source, sent, store, folder, capsys, ray_session
):
    from transformers import AutoModelForCausalLM

    run(source, output="here")
    expected = {name: data for name, data in contents(folder / "here").items() if name not in OURS}
    capsys.readouterr()
    uris = {**sent, "output": "memory://out/my model", "run_dir": "memory://runs/first"}
    assert run(source, **uris) == "memory://runs/first/report.json"
    assert "checkpoint: memory://out/my model" in capsys.readouterr().out
    found = {name: data for name, data in stored(store, "/out/my model").items() if name not in OURS}
    assert found == expected
    left = stored(store, "/runs/first")
    config = yaml.safe_load(left["config.yaml"])
    assert [config["model"], config["calibration"]["source"], config["output"], config["run_dir"]] == list(
        {**sent, "output": uris["output"], "run_dir": uris["run_dir"]}.values()
    )
    report = json.loads(left["report.json"])
    assert report["output"] == "memory://out/my model"
    assert report["config"] == config
    assert str(folder) not in json.dumps(report)
    assert report["metrics"]["blocks_resumed"] == 0
    assert not any(path.is_file() for path in (folder / "cache" / "outputs").glob("*/**/*"))

    store.get("/out/my model", "loaded", recursive=True)
    original = evaluate._original(EvaluateConfig(), Checkpoint(Path("loaded")))
    assert contents(original) == contents(source), "known by its URI wherever the output is taken to"
    model = AutoModelForCausalLM.from_pretrained("loaded", dtype=torch.float32)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()

    run(source, **{**uris, "run_dir": "memory://runs/again"})
    assert json.loads(stored(store, "/runs/again")["report.json"])["metrics"]["blocks_resumed"] == BLOCKS


@pytest.mark.ray
def test_a_failed_run_resumes_on_a_fresh_machine(source, sent, store, folder, monkeypatch, ray_session):
    def fail(self):
        raise RuntimeError("the machine is on fire")

    uris = {**sent, "output": "memory://out/model", "run_dir": "memory://runs/failed"}
    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "finish", fail)
        with pytest.raises(RuntimeError, match="on fire"):
            run(source, **uris)
    unfinished = stored(store, "/out/model")
    assert sum(name.endswith(".safetensors") for name in unfinished) == BLOCKS
    assert "config.json" not in unfinished
    assert b"on fire" in stored(store, "/runs/failed")["hasten.log"]
    monkeypatch.setenv("HASTEN_CACHE", str(folder / "another machine"))
    run(source, **{**uris, "run_dir": "runs/compress/second"})
    report = json.loads((folder / "runs/compress/second/report.json").read_text())
    assert report["metrics"]["blocks_resumed"] == BLOCKS
    finished = stored(store, "/out/model")
    assert {name: finished[name] for name in unfinished} == unfinished
    assert {"config.json", "model.safetensors.index.json"} <= finished.keys()


@pytest.mark.ray
def test_a_refusal_names_the_uri_and_not_the_copy(source, sent, store, folder, ray_session):
    run(source, **sent, output="memory://out/model")
    with pytest.raises(UserError, match=r"^output=memory://out/model was begun with other settings \(") as refusal:
        run(source, **sent, output="memory://out/model", bits=3)
    assert str(folder) not in str(refusal.value)


@pytest.mark.parametrize("noted", ["file://{folder}/gone", "memory://models/gone"])
def test_an_original_that_is_gone_is_done_without(noted, folder, caplog):
    tiny.save(folder / "model", "llama")
    (folder / "model" / ".hasten").mkdir()
    content = {"original": noted.format(folder=folder)}
    (folder / "model" / ".hasten" / "source.json").write_text(json.dumps(content))
    assert evaluate._original(EvaluateConfig(), Checkpoint(folder / "model")) is None
    assert ("does not exist" in caplog.text) == noted.startswith("memory")


def test_without_uris_the_config_is_passed_on_unchanged():
    config = DecodeConfig()
    with local_paths(DecodeConfig, config) as local:
        assert local is config


def test_file_uris_are_used_in_place_and_named_as_they_were_given(folder):
    config = DecodeConfig(prompts=f"file://{folder}/prompts.jsonl", run_dir=f"file://{folder}/run")
    with local_paths(DecodeConfig, config) as local:
        assert local.prompts == f"{folder}/prompts.jsonl"
        start(local)
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["prompts"] == config.prompts
    assert not (folder / "cache").exists()


def test_an_input_that_is_missing_is_named_by_its_option_before_anything_is_written(store, folder):
    config = DecodeConfig(prompts="memory://data/prompts.jsonl", run_dir="memory://runs/first")
    with (
        pytest.raises(UserError, match=r"prompts=memory://data/prompts\.jsonl does not exist"),
        local_paths(DecodeConfig, config),
    ):
        pytest.fail("the job was started")
    assert not store.find("/")
    assert not list(folder.iterdir())


def test_state_is_fetched_changed_and_sent(store):
    store.pipe_file("/memory/learned.safetensors", b"before")
    config = DecodeConfig(memory="memory://memory/learned.safetensors", run_dir="here")
    with local_paths(DecodeConfig, config) as local:
        assert Path(local.memory).read_bytes() == b"before"
        Path(local.memory).write_bytes(b"before and after")
    assert store.cat_file("/memory/learned.safetensors") == b"before and after"


def test_finished_files_are_uploaded_while_the_run_continues(store, monkeypatch):
    monkeypatch.setattr(storage, "_SECONDS_BETWEEN_SENDS", 0.01)
    config = DecodeConfig(output="memory://out/completions.jsonl", run_dir="here")
    with local_paths(DecodeConfig, config) as local:
        Path(local.output).write_text("{}\n")
        # A file that is being sent is there before it is whole.
        for _ in range(1000):
            if store.exists("/out/completions.jsonl") and store.cat_file("/out/completions.jsonl"):
                break
            time.sleep(0.01)
        assert store.cat_file("/out/completions.jsonl") == b"{}\n"


def work(config, error=None):
    """A job that writes its results, and then ends with the error, if there is one."""
    with local_paths(DecodeConfig, config) as local:
        start(local)
        Path(local.output).write_text("{}\n")
        if error is not None:
            raise error


def test_an_interrupted_run_keeps_its_results_here_and_the_same_command_sends_them(store):
    config = DecodeConfig(output="memory://out/completions.jsonl", run_dir="memory://runs/first")
    with pytest.raises(KeyboardInterrupt):
        work(config, KeyboardInterrupt())
    log_to_terminal()
    assert not store.exists("/out/completions.jsonl")
    assert store.exists("/runs/first/config.yaml")
    with local_paths(DecodeConfig, config) as local:
        assert Path(local.output).read_text() == "{}\n"
    assert store.cat_file("/out/completions.jsonl") == b"{}\n"


def test_results_that_cannot_be_sent_stay_here_and_the_error_says_where(store, monkeypatch):
    send = MemoryFileSystem.put_file

    def refuse(self, path, target, **options):
        if target.startswith("/out"):
            raise ConnectionError("connection reset")
        send(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    config = DecodeConfig(output="memory://out/completions.jsonl", run_dir="memory://runs/first")
    with pytest.raises(UserError, match=r"output=memory://out/.*what was made lies in .*: the same command") as refusal:
        work(config)
    log_to_terminal()
    place = re.search(r"lies in (\S+): the same", str(refusal.value))
    assert place is not None
    assert Path(place[1]).read_text() == "{}\n"
    assert store.exists("/runs/first/config.yaml")
