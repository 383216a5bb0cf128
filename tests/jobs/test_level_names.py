"""Levels of any kind by their names, given to compress and levels on the session's Ray."""

import pytest

from hasten.accel.compression.levels.level import parse_level
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.main import main
from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.compress.run import make_settings
from tests.jobs.report import last_report


def run(job, source, **changes):
    """Exit code of a quick run."""
    options = {
        "model": source,
        "output": "out",
        "workers": 1,
        "calibration.source": source.parent / "tokens.npy",
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
    }
    if job == "compress":
        options["evaluation.sequences"] = 0  # the checkpoint has no tokenizer
    return main([job, *(f"{key}={value}" for key, value in (options | changes).items())])


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("compress", {"level": "x"}, "level=x is wrong: expected a name like "),
        ("compress", {"level": "w9"}, "bits=9 is out of range: 2 to 8"),
        ("compress", {"level": "w4g48"}, "group_size=48 does not divide the 64 columns"),
        ("compress", {"scheme": "fp8", "bits": 3}, "scheme=fp8 and bits=3 are given, which both say"),
        ("compress", {"scheme": "fp8", "group_size": 32}, "scheme=fp8 and group_size=32 are given"),
        ("compress", {"scheme": "w4a16", "group_size": 48}, "group_size=48 does not divide the 64 columns"),
        ("compress", {"scheme": "fp8", "level": "w4"}, "scheme=fp8 and level=w4 are given"),
        ("compress", {"scheme": "fp8_block"}, "level fp8_block needs a multiple of 128 columns, model.layers.0."),
        ("compress", {"level": "w4g32a8s"}, "level w4g32a8s is wrong: servers read static scales of inputs with w8a8s"),
        ("levels", {"bits": "[]", "schemes": "[fp8,x]"}, "schemes=[x] is wrong: expected w4a16, "),
        ("levels", {"bits": "[]", "extra_levels": "[s50,y]"}, "extra_levels=y is wrong: expected a name like "),
        ("levels", {"bits": "[]", "extra_levels": "[s50,s50]"}, "extra_levels=['s50', 's50'] is wrong"),
    ],
)
def test_a_wrong_name_is_refused_and_nothing_is_written(job, changes, message, source, folder, capsys):
    assert run(job, source, **changes) == 2
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.ray
def test_compress_takes_a_level_of_any_kind_and_counts_its_bits(source, folder, capsys, ray_session):
    assert run("compress", source, level="s50", pruner="wanda") == 0
    report, _ = last_report(capsys)
    assert {row["method"] for row in report["layers"]} == {"Wanda"}
    itemsize = Checkpoint(folder / "out").dtype("model.layers.0.mlp.up_proj.weight").itemsize
    assert report["metrics"]["bits_per_weight"] == parse_level("s50").stored_bits(8, 8, itemsize) / 64
    assert not Checkpoint(folder / "out").is_compressed


@pytest.mark.ray
def test_compress_takes_the_name_that_servers_use(source, folder, capsys, ray_session):
    assert run("compress", source, scheme="nvfp4a16", quantizer="round_to_nearest") == 0
    report, _ = last_report(capsys)
    weights = sum(row["weights"] for row in report["layers"])
    stored = sum(row["stored_bits"] for row in report["layers"])
    # 4 bits, an FP8 scale for 16 weights, and a float32 scale for each layer.
    assert stored == 4.5 * weights + 32 * len(report["layers"])
    assert report["metrics"]["bits_per_weight"] == stored / weights
    assert Checkpoint(folder / "out").config["quantization_config"]["format"] == "nvfp4-pack-quantized"


@pytest.mark.ray
def test_compress_by_the_name_of_a_grid_is_compress_by_its_bits(source, folder, capsys, ray_session):
    quick = {"quantizer": "round_to_nearest"}
    assert run("compress", source, level="w4g32a", output="named", **quick) == 0
    named, _ = last_report(capsys)
    assert run("compress", source, bits=4, group_size=32, output="given", **quick) == 0
    given, _ = last_report(capsys)
    assert named["metrics"]["bits_per_weight"] == given["metrics"]["bits_per_weight"]
    for file in (folder / "given").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "named" / file.name).read_bytes()


def test_a_scheme_has_the_groups_that_are_given(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    names = {"auto": "w4gauto", 32: "w4g32", -1: "w4"}
    for size, name in names.items():
        config = compose("compress", CompressConfig, [f"model={source}", "scheme=w4a16", f"group_size={size}"])
        assert make_settings(config, source).level == parse_level(name)


@pytest.mark.ray
def test_levels_takes_further_levels_by_name_behind_the_others(source, folder, capsys, ray_session):
    changes = {"bits": "[3]", "group_sizes": "[32]", "extra_levels": "[c2.5,w3g32,w4g32a]"}
    assert run("levels", source, **changes) == 0
    report, _ = last_report(capsys)
    assert report["levels"] == ["w3g32", "c2.5", "w4g32a"]
