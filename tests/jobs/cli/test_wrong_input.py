"""Every wrong input ends in one line that names the value and what would be right, and leaves no trace on the disk."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.cli.main import main
from tests.models import tiny

UP = "model.layers.1.mlp.up_proj.weight"
OPTIONS = {
    "compress": {
        "model": "model",
        "output": "out",
        "group_size": "32",
        "calibration.source": "tokens.npy",
        "calibration.sequences": "8",
        "calibration.sequence_length": "16",
        "evaluation.sequences": "0",
        "workers": "1",
    },
    "evaluate": {
        "model": "model",
        "evaluation.source": "tokens.npy",
        "evaluation.sequences": "8",
        "evaluation.sequence_length": "16",
        "workers": "1",
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of a sound checkpoint, by whether it is in shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {sharded: tiny.save(folder / str(sharded), "llama", sharded, torch.bfloat16) for sharded in (False, True)}


@pytest.fixture(autouse=True)
def folder(checkpoints, tmp_path, monkeypatch):
    """The current folder, with two checkpoints and token ids in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints[False], "model")
    shutil.copytree(checkpoints[True], "sharded")
    np.save("tokens.npy", tiny.tokens(8, 16).numpy())
    np.save("stream.npy", tiny.tokens(8, 16).numpy().reshape(-1))
    return tmp_path


@pytest.fixture
def refused(folder, capsys):
    """Runs a job and checks that it refuses its input without writing; returns nothing."""

    def check(job, options, words):
        before = snapshot(folder)
        code = main([job, *(f"{key}={value}" for key, value in (OPTIONS[job] | options).items())])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert [line for line in lines if line.startswith("hasten: error: ")] == lines[-1:]
        assert lines == lines[-1:], "a log line or a warning stands beside the error"
        assert [word for word in words if word not in lines[-1]] == [], lines[-1]
        assert snapshot(folder) == before

    return check


def snapshot(folder):
    """Everything below a folder, by its path: the time of a folder's last change, a file's content."""
    found = {path: path.read_bytes() if path.is_file() else path.stat().st_mtime_ns for path in folder.rglob("*")}
    return found | {folder: folder.stat().st_mtime_ns}


def change(name, edit):
    """Store a tensor of the checkpoint anew."""
    tensors = load_file("model/model.safetensors")
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def fill(name, value):
    """Put a value in a single place of a tensor, its last one."""

    def edit(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    change(name, edit)


def shard(folder):
    """A file of the sharded checkpoint that holds weights of the last block."""
    weight_map = json.loads((folder / "sharded/model.safetensors.index.json").read_text())["weight_map"]
    return folder / "sharded" / weight_map[UP]


def no_config(folder):
    (folder / "model/config.json").unlink()


def bin_only(folder):
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")


def truncate(folder):
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def truncate_shard(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-1])


def truncate_header(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:100])


def remove_shard(folder):
    shard(folder).unlink()


def wrong_shape(folder):
    change(UP, lambda tensor: tensor[:, :32])


def unsupported(folder):
    path = folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "no_such_type"}))


DAMAGED = {
    "no such path": (None, {"model": "nowhere"}, ["model='nowhere' does not exist", "a checkpoint folder"]),
    "no config": (no_config, {}, ["model has no config.json", "give the folder of a transformers checkpoint"]),
    "only .bin": (bin_only, {}, ["model has .bin weights only", "convert them to safetensors"]),
    "truncated": (truncate, {}, ["model/model.safetensors is truncated", "ends at byte"]),
    "truncated shard": (truncate_shard, {"model": "sharded"}, ["sharded/model-0", "is truncated"]),
    "truncated header": (truncate_header, {"model": "sharded"}, ["100 bytes end inside the header"]),
    "missing shard": (remove_shard, {"model": "sharded"}, ["sharded/model-0", "is missing"]),
    "wrong shape": (wrong_shape, {}, [f"tensor {UP}", "has shape [128, 32]", "needs [128, 64]"]),
    "unsupported": (unsupported, {}, ["no_such_type"]),
}


@pytest.mark.parametrize("job", ["compress", "evaluate"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused(case, job, folder, refused):
    damage, options, words = DAMAGED[case]
    if damage:
        damage(folder)
    refused(job, options, words)


NOT_FINITE = {
    "NaN in a layer left alone": (UP, torch.nan, {"ignore": "up_proj", "overwrite": "true"}),
    # The last row: no calibration token needs to reach it.
    "Inf in the embedding": ("model.embed_tokens.weight", torch.inf, {"quantizer": "round_to_nearest", "workers": "2"}),
}


@pytest.mark.ray
@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(case, refused, ray_session):
    name, value, options = NOT_FINITE[case]
    fill(name, value)
    refused("compress", options, [f"tensor {name} in ", "must be finite"])


@pytest.mark.parametrize("name", [UP, "model.layers.0.input_layernorm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_tensor_is_checked(name, value, folder):
    fill(name, value)
    checkpoint = Checkpoint(folder / "model")
    for sound in set(checkpoint.names) - {name}:
        checkpoint.check(sound)
    with pytest.raises(UserError, match=f"tensor {name} in .*/model holds .* values: every weight must be finite"):
        checkpoint.check(name)


@pytest.mark.ray
def test_evaluate_names_a_weight_that_is_not_finite(refused, ray_session):
    fill(UP, torch.nan)
    refused("evaluate", {}, [f"tensor {UP} in ", "/model holds NaN values", "must be finite"])


@pytest.mark.ray
def test_a_damaged_original_is_found_before_the_evaluation(folder, refused, ray_session):
    shutil.copytree("model", "sound")
    fill(UP, torch.nan)
    refused("evaluate", {"model": "sound", "original": "model"}, [f"tensor {UP} in ", "/model holds NaN values"])


WRONG = {
    "1 bit": ({"bits": "1"}, ["bits=1 ", "from 2 to 8"]),
    "9 bits": ({"bits": "9"}, ["bits=9 ", "from 2 to 8"]),
    "group of 0": ({"group_size": "0"}, ["group_size=0 is out of range", "8 or more, or -1"]),
    "group of 4": ({"group_size": "4"}, ["group_size=4 is out of range", "8 or more, or -1"]),
    "group of -2": ({"group_size": "-2"}, ["group_size=-2 ", "-1 or more"]),
    "group that does not divide": (
        {"group_size": "48"},
        [
            "group_size=48",
            "64 columns of model.layers.0.self_attn.q_proj and 11 more, nor the 128 columns of model.layers.0.mlp.down",
            "14 of 14 layers",
            "use group_size=auto; one of 8, 16, 32, 64, which divide all layers; group_size=-1",
        ],
    ),
    "group larger than the layer": ({"group_size": "128"}, ["group_size=128", "64 columns of model.layers.0"]),
    "too few sequences": (
        {"calibration.sequences": "9"},
        ["tokens.npy holds 8 sequences of 16 tokens", "fewer than the 9 of 16"],
    ),
    "too short sequences": (
        {"calibration.sequence_length": "17"},
        ["tokens.npy holds 8 sequences of 16 tokens", "fewer than the 8 of 17"],
    ),
    "too few tokens in a stream": (
        {"calibration.source": "stream.npy", "calibration.sequences": "9"},
        ["stream.npy holds 128 tokens", "fewer than the 144 asked for"],
    ),
    "too few tokens to evaluate on": (
        {"evaluation.source": "tokens.npy", "evaluation.sequences": "9", "evaluation.sequence_length": "16"},
        ["tokens.npy holds 8 sequences of 16 tokens", "fewer than the 9 of 16"],
    ),
    "no such tokens": ({"calibration.source": "none.npy"}, ["source=none.npy: no such file", "library"]),
    "text without a tokenizer": ({"calibration.source": "library"}, ["no tokenizer", "give a .npy"]),
    "unknown option": ({"grop_size": "32"}, ["unknown option 'grop_size'", "did you mean group_size?"]),
    "unknown nested option": (
        {"calibration.sequence": "8"},
        ["unknown option 'calibration.sequence'", "did you mean calibration.sequences?"],
    ),
    "unknown option of the quantizer": (
        {"quantizer.dampin": "1"},
        ["unknown option 'quantizer.dampin'", "did you mean quantizer.damping?"],
    ),
    "unknown quantizer": ({"quantizer": "gtpq"}, ["quantizer=gtpq", "gptq, round_to_nearest", "did you mean gptq?"]),
    "quantizer out of range": ({"quantizer.damping": "-1"}, ["need 0 < damping <= max_damping", "got -1.0"]),
    "wrong type of a number": ({"workers": "many"}, ["workers=many is wrong", "a whole number"]),
    "wrong type of a switch": ({"symmetric": "perhaps"}, ["symmetric=perhaps is wrong", "true or false"]),
    "wrong type of a list": ({"ignore": "[[a]]"}, ["ignore=[[a]] is wrong", "a list such as [a,b]"]),
    "more workers than chunks": (
        {"workers": "9", "calibration.shards": "4"},
        ["workers=9 is more than the 4 chunks", "use workers=4", "more calibration.shards"],
    ),
    "broken regex": ({"ignore": "up_(proj"}, ["ignore='up_(proj' is no regular expression"]),
    "regex that matches nothing": ({"ignore": "upproj"}, ["ignore='upproj' matches no layer", "model.layers.0."]),
    "nothing left": ({"skip_first": "2"}, ["no layer is left to quantize"]),
    "more blocks skipped than there are": ({"skip_last": "3"}, ["skip_last=3", "the model has 2 blocks"]),
    "output is a file": ({"output": "tokens.npy"}, ["tokens.npy is a file", "a folder that is new or empty"]),
    "output in a file": ({"output": "tokens.npy/out"}, ["tokens.npy/out cannot be made"]),
    "output is the model": ({"output": "model"}, ["model holds something else", "a folder that is new or empty"]),
    "output with overwrite is the model": ({"output": "model", "overwrite": "true"}, ["model holds something else"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_refused(case, refused):
    refused("compress", *WRONG[case])


@pytest.mark.parametrize("job", ["compress", "evaluate"])
def test_cuda_is_refused_where_there_is_none(job, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(job, {"device": "cuda"}, ["device=cuda", "no CUDA device", "use device=cpu or device=auto"])


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_an_output_folder_of_somebody_else_is_refused(overwrite, folder, refused):
    (folder / "out").mkdir()
    (folder / "out/thesis.tex").write_text("years of work")
    refused("compress", {"overwrite": overwrite}, ["out holds something else", "a folder that is new or empty"])


def test_an_output_folder_of_another_run_is_refused(folder, refused):
    (folder / "out/.hasten").mkdir(parents=True)
    (folder / "out/.hasten/fingerprint.json").write_text('{"bits": 3}')
    refused("compress", {}, ["out was begun with other settings", "bits: 3, now 4", "overwrite=true to start again"])


def test_an_unknown_token_is_refused(refused):
    np.save("tokens.npy", np.full((8, 16), tiny.VOCABULARY))
    for job in OPTIONS:
        refused(job, {}, [f"token id {tiny.VOCABULARY}, outside the model's vocabulary", "(0 to 95)"])
