"""A weight in a type that is not read is refused by every job in one line, before anything starts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.cli.main import main
from tests.models import tiny

UP = "model.layers.1.mlp.up_proj.weight"
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]
JOBS = [
    "compress model=model",
    "compress model=model plan=true",
    "levels model=model",
    "search model=model",
    "search model=model plan=true",
    "evaluate model=model",
    "decode target=model",
    "decode target=model plan=true",
    "decode draft=model drafter=draft_model",
    "replay target=model drafter=draft_model draft=model",
    "train_drafter target=model",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("checkpoints") / "model", "llama", dtype=torch.bfloat16)


def change(source, folder, name, edit):
    """A copy of a checkpoint in which a tensor is stored anew."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name] = edit(tensors.get(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("words", JOBS)
def test_a_weight_in_float8_is_refused_by_every_job(words, checkpoint, tmp_path, monkeypatch, capsys):
    change(checkpoint, tmp_path / "model", UP, lambda tensor: tensor.to(torch.float8_e4m3fn))
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hasten: error: tensor {UP} in ")
    assert "is stored as float8_e4m3fn: weights must be float32, bfloat16, float16, float64" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_that_is_not_read_is_named(dtype, checkpoint, tmp_path):
    folder = change(checkpoint, tmp_path / "model", UP, lambda tensor: tensor.to(dtype))
    with pytest.raises(UserError, match=f"{UP} .* is stored as {str(dtype).removeprefix('torch.')}:"):
        Checkpoint(folder)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_bias_in_such_a_type_is_refused_too(dtype, tmp_path):
    source = tiny.save(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    name = "model.layers.1.self_attn.q_proj.bias"
    folder = change(source, tmp_path / "model", name, lambda tensor: tensor.to(dtype))
    with pytest.raises(UserError, match=f"{name} .* is stored as {str(dtype).removeprefix('torch.')}:"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.position_ids", "model.layers.1.self_attn.bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.uint16], ids=str)
def test_a_buffer_may_have_any_type(dtype, name, checkpoint, tmp_path):
    folder = change(checkpoint, tmp_path / "model", name, lambda _: torch.ones(4, dtype=torch.uint8).to(dtype))
    assert Checkpoint(folder).dtype(name) == dtype
