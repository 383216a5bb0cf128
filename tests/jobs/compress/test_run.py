"""The whole job on a tiny checkpoint, in this process, on the session's Ray."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.cli.main import main
from tests.compression.local import contents
from tests.jobs.report import METRICS, last_report
from tests.models.test_hub_snapshots import snapshot

BLOCKS = 3


def compress(source, **changes):
    """Exit code of a quick compression of the checkpoint into `out`."""
    options = {
        "model": source,
        "output": "out",
        "group_size": 32,
        "workers": 1,
        "calibration.source": source.parent / "tokens.npy",
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
        "evaluation.source": source.parent / "tokens.npy",
        "evaluation.sequences": 4,
        "evaluation.sequence_length": 16,
    }
    return main(["compress", *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.ray
def test_a_run_is_reported_and_tracked_and_the_same_command_resumes_it(source, folder, capsys, ray_session):
    assert compress(source, gate="[kl<1e-9]") == 3
    report, run_dir = last_report(capsys)
    assert {"job", "config", "metrics", "layers", "output"} <= set(report)
    assert report["job"] == "compress"
    assert [(row["gate"], row["passed"], len(row["errors"])) for row in report["gates"]] == [("kl<1e-9", False, 3)]
    assert report["config"]["bits"] == 4
    assert report["config"]["quantizer"]["_target_"].endswith("GPTQ")
    assert set(report["metrics"]) >= METRICS
    assert None not in [report["metrics"][name] for name in METRICS]
    assert report["metrics"]["kl_divergence"] > 0
    # 4 bits, and a scale of 16 and a zero point of 4 bits for 32 weights.
    assert report["metrics"]["bits_per_weight"] == pytest.approx(4 + 20 / 32, rel=0.01)
    assert report["metrics"]["blocks_resumed"] == 0
    assert [row["block"] for row in report["blocks"]] == list(range(BLOCKS))
    assert len(report["layers"]) == 7 * BLOCKS
    assert {row["layer"] for row in report["layers"]} >= {"model.layers.2.mlp.down_proj"}
    assert Path(report["output"]) == folder / "out"
    assert {path.name for path in run_dir.iterdir()} >= {"config.yaml", "hasten.log", "error_per_layer.png"}
    assert (run_dir / "seconds_per_block.png").read_bytes().startswith(b"\x89PNG")
    check_tracked(report, run_dir)

    before = contents(folder / "out")
    assert compress(source, workers=2) == 0
    again, _ = last_report(capsys)
    assert again["metrics"]["blocks_resumed"] == BLOCKS
    assert again["blocks"] == []
    assert again["layers"] == report["layers"]
    for name in ("perplexity", "kl_divergence", "top1_agreement", "bits_per_weight", "bytes"):
        # Two processes add the windows up in another order than one.
        assert again["metrics"][name] == pytest.approx(report["metrics"][name], rel=1e-5)
    assert contents(folder / "out") == before


def check_tracked(report, run_dir):
    """The MLflow run in this folder's sqlite file has the parameters, figures and metrics of the report."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("hasten")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["calibration.sequences"] == "8"
    assert run.data.tags["hasten.run_dir"] == str(run_dir.resolve())
    assert run.data.tags["machine.host"]
    assert run.data.tags["hasten.original"] == report["config"]["model"]
    assert run.data.tags["hasten.evaluation.source"] == report["config"]["evaluation"]["source"]
    for name in METRICS:
        assert run.data.metrics[name] == pytest.approx(report["metrics"][name])
    for name in ("block_error", "block_seconds"):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in history) == list(range(BLOCKS))
    by_block = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "block_error")}
    assert by_block == pytest.approx({row["block"]: row["error"] for row in report["blocks"]})
    names = [entry.path for entry in client.list_artifacts(run.info.run_id, "figures")]
    assert sorted(names) == ["figures/error_per_layer.png", "figures/seconds_per_block.png"]


@pytest.mark.ray
def test_one_sequence_of_sixteen_calibration_tokens_is_enough(source, folder, capsys, ray_session):
    assert compress(source, **{"calibration.sequences": 1}) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["kl_divergence"] > 0
    assert all(row["error"] >= 0 for row in report["layers"])


@pytest.mark.ray
def test_hundreds_of_patterns_leave_their_layers_alone(source, folder, capsys, ray_session):
    patterns = [rf"layers\.{number % BLOCKS}\.mlp\.(down_proj|{number}x)" for number in range(400)]
    ignore = "[" + ",".join(f"'{pattern}'" for pattern in patterns) + "]"
    assert compress(source, ignore=ignore, **{"evaluation.sequences": 0}) == 0
    report, _ = last_report(capsys)
    assert len(report["layers"]) == 6 * BLOCKS
    assert not [row["layer"] for row in report["layers"] if "down_proj" in row["layer"]]
    section = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    assert {f"model.layers.{block}.mlp.down_proj" for block in range(BLOCKS)} <= set(section["ignore"])


@pytest.mark.ray
def test_a_hub_snapshot_of_links_gives_the_bytes_of_its_files(source, folder, capsys, ray_session):
    links = snapshot(folder, source)
    before = {path: path.read_bytes() for path in links.parents[1].rglob("*") if path.is_file()}
    assert compress(source, output="plain", **{"evaluation.sequences": 0}) == 0
    assert compress(source, model=links, output="linked", **{"evaluation.sequences": 0}) == 0
    linked, plain = contents(folder / "linked"), contents(folder / "plain")
    # Names the original by its path.
    assert linked.pop(".hasten/source.json") != plain.pop(".hasten/source.json")
    assert linked == plain
    assert not [path for path in (folder / "linked").rglob("*") if path.is_symlink()]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.ray
def test_other_settings_are_refused_until_overwritten(source, folder, capsys, ray_session):
    options = {"quantizer": "round_to_nearest", "evaluation.sequences": 0}
    assert compress(source, **options) == 0
    before = contents(folder)
    capsys.readouterr()
    assert compress(source, **options, bits=3) == 2
    assert "bits: 4, now 3" in capsys.readouterr().err
    assert contents(folder) == before
    (folder / "out/model-00009-of-00009.safetensors").touch()
    assert compress(source, **options, bits=3, overwrite="true") == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["blocks_resumed"] == 0
    assert {row["bits"] for row in report["layers"]} == {3}
    assert not (folder / "out/model-00009-of-00009.safetensors").exists()


@pytest.mark.ray
def test_a_tracking_store_or_run_folder_that_cannot_be_used_ends_the_run_before_there_is_output(
    source, folder, capsys, ray_session
):
    (folder / "file").write_text("no folder, and no database")
    for option in (f"tracking.uri=sqlite:///{folder}/file", "run_dir=file/run"):
        name, _, value = option.partition("=")
        assert compress(source, **{name: value}) == 2
        assert f"hasten: error: {name}={value} cannot be" in capsys.readouterr().err
    assert not (folder / "out").exists()


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(folder):
    """A file system of 96 KiB: room for some blocks of the checkpoint's output, not for all of it."""
    path = folder / "disk"
    path.mkdir()
    done = mount("-t", "tmpfs", "-o", "size=96k", "tmpfs", str(path))
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.ray
def test_a_full_disk_ends_the_run_and_the_same_command_finishes_after_space_is_made(
    source, folder, small_disk, capsys, ray_session
):
    options = {"evaluation.sequences": 0, "quantizer": "round_to_nearest", "bits": 8}
    assert compress(source, **options) == 0
    size = sum(len(content) for content in contents(folder / "out").values())
    assert size > os.statvfs(small_disk).f_blocks * os.statvfs(small_disk).f_frsize
    capsys.readouterr()

    output = small_disk / "out"
    assert compress(source, **options, output=output) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("hasten: error: the disk is full while writing model-0")
    assert message.endswith("make space and run the same command again; what is finished is kept")
    finished = {path.name: path.read_bytes() for path in output.glob("model-*.safetensors")}
    assert 0 < len(finished) < BLOCKS
    # What did not fit takes no room.
    assert list(output.rglob("*.tmp")) == []
    assert not (output / "config.json").exists()

    assert mount("-o", "remount,size=4m", str(small_disk)).returncode == 0
    assert compress(source, **options, output=output) == 0
    assert last_report(capsys)[0]["metrics"]["blocks_resumed"] == len(finished)
    assert contents(output) == contents(folder / "out")


@pytest.mark.ray
def test_output_layer_and_embedding_are_compressed_and_counted(source, folder, capsys, ray_session):
    assert compress(source, head_bits=8, embedding_bits=6, embedding_group_size=64) == 0
    report, _ = last_report(capsys)
    rows = {row["layer"]: row for row in report["layers"]}
    assert (rows["lm_head"]["bits"], rows["lm_head"]["group_size"], rows["lm_head"]["method"]) == (8, 32, "GPTQ")
    assert (rows["model.embed_tokens"]["bits"], rows["model.embed_tokens"]["group_size"]) == (6, 64)
    assert [row["block"] for row in report["blocks"]] == list(range(BLOCKS + 1))
    assert report["loader"] == "hasten.accel.models.transformers_loader"
    metrics = report["metrics"]
    assert metrics["bits_per_weight_blocks"] == pytest.approx(4 + 20 / 32, rel=0.01)
    assert metrics["bits_per_weight"] > metrics["bits_per_weight_blocks"]
    assert metrics["kl_divergence"] > 0
    before = contents(folder / "out")
    assert compress(source, head_bits=8, embedding_bits=6, embedding_group_size=64, workers=2) == 0
    again, _ = last_report(capsys)
    assert again["metrics"]["blocks_resumed"] == BLOCKS + 1
    assert contents(folder / "out") == before
    assert again["metrics"]["kl_divergence"] == metrics["kl_divergence"]


@pytest.mark.ray
def test_inputs_keys_and_values_get_static_scales(source, folder, capsys, ray_session):
    options = {"level": "w8a8s", "quantizer": "round_to_nearest", "input_observer": "squared_error", "workers": 2}
    assert compress(source, attention="fp8", **options) != 0
    assert "give kv_cache=fp8 or fp8_head" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert compress(source, kv_cache="fp8_head", attention="fp8", **options) == 0
    report, _ = last_report(capsys)
    assert report["metrics"]["kl_divergence"] > 0
    stored = Checkpoint(folder / "out")
    states = stored.attention("model.layers.2.self_attn", ["LlamaAttention"])
    assert sorted(states) == ["k", "q", "v"]
    assert len(states["k"].scale) == stored.config["num_key_value_heads"]
    fused = [stored.inputs(f"model.layers.1.self_attn.{name}_proj").scale for name in "qkv"]
    assert len({float(scale) for scale in fused}) == 1
