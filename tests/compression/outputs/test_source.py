"""Checkpoints that others quantized as sources of a compression."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hasten.accel.compression.calibration.settings import Task
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.sources import without_quantization
from tests.compression import local
from tests.models import foreign, tiny


def _same_bytes(source: Path, plain: Path, folder: Path) -> dict[str, object]:
    """Compress a source and its dequantized tensors in `plain`; the quantization_config of both outputs."""
    config = json.loads((source / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(without_quantization(config)))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", plain)
    for path in (source, plain):
        local.compress(local.settings(path, folder / f"{path.name}-out"), tiny.tokens(4))
    found, expected = (local.contents(folder / f"{name}-out") for name in ("source", "plain"))
    differing = [name for name in expected if found.get(name) != expected[name]]
    # What the run records of its source.
    assert [name for name in differing if not name.startswith(".hasten/")] == []
    assert found.keys() == expected.keys()
    written: dict[str, object] = json.loads(found["config.json"])["quantization_config"]
    return written


@pytest.mark.parametrize("kind", ["fp8", "FP8_DYNAMIC", "NVFP4", "MXFP4A16"])
def test_a_quantized_source_gives_the_bytes_of_its_dequantized_checkpoint(kind, tmp_path):
    source = tmp_path / "source"
    if kind == "fp8":
        foreign.save_fp8(source, block=(32, 32))
        weights = {name: Checkpoint(source).tensor(name) for name in Checkpoint(source).names}
    else:
        weights = foreign.save_compressed(source, kind)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, plain / "model.safetensors")
    written = _same_bytes(source, plain, tmp_path)
    assert written["format"] == "pack-quantized"
    assert "weight_block_size" not in written


def test_a_config_without_quantized_layers_says_nothing_of_the_sources(tmp_path):
    from hasten.accel.compression.levels.depth import shorten
    from hasten.accel.models.architecture import Architecture

    foreign.save_fp8(tmp_path / "source", block=(32, 32))
    architecture = Architecture(Checkpoint(tmp_path / "source"))
    for kept in ([0, 1], [1]):
        assert "quantization_config" not in shorten(architecture, kept)


def test_a_source_whose_transforms_are_folded_is_compressed(tmp_path):
    source = tmp_path / "source"
    foreign.save_compressed(source, "W8A8")
    config = json.loads((source / "config.json").read_text())
    folded = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}
    config["quantization_config"]["transform_config"] = {"config_groups": {"R1": folded}}
    (source / "config.json").write_text(json.dumps(config))
    Task(local.settings(source, tmp_path / "out"))


def test_an_output_whose_original_is_gone_is_a_source(tmp_path):
    source = tiny.save(tmp_path / "source", "llama")
    local.compress(local.settings(source, tmp_path / "out"), tiny.tokens(4))
    shutil.rmtree(source)
    assert Task(local.settings(tmp_path / "out", tmp_path / "again")).checkpoint.is_compressed


def test_a_source_in_mxfp4_gives_the_bytes_of_its_dequantized_checkpoint(tmp_path):
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    source, plain = tmp_path / "source", tmp_path / "plain"
    tensors = foreign.save_mxfp4(source)
    plain.mkdir()
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = _convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(tensors, plain / "model.safetensors")
    _same_bytes(source, plain, tmp_path)
