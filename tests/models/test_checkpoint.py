import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.models.shards import Stored
from tests.models import tiny

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def plain(checkpoints, tmp_path) -> Path:
    """A private copy of an unsharded Llama."""
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "plain"))


@pytest.fixture
def sharded(checkpoints, tmp_path) -> Path:
    """A private copy of a Llama in several shards."""
    return Path(shutil.copytree(checkpoints("llama", sharded=True), tmp_path / "sharded"))


def refused(path: Path | str, *words: str) -> None:
    """Assert that the folder is refused with a message of one line that contains these words."""
    with pytest.raises(UserError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_tensors_are_what_safetensors_reads(plain, sharded):
    expected = load_file(plain / "model.safetensors")
    for path in (plain, sharded):
        checkpoint = Checkpoint(path)
        assert checkpoint.names == sorted(expected)
        assert not checkpoint.is_compressed
        for name, tensor in expected.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) == tensor.dtype
            assert checkpoint.nbytes(name) == checkpoint.stored_bytes(name) == tensor.nbytes
            assert torch.equal(checkpoint.tensor(name), tensor)
    assert Checkpoint(plain).tensor(NAME, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.int8])
def test_every_dtype_and_odd_shape_is_read(plain, dtype):
    tensors = {
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.ones(0, 3, dtype=dtype),
        "odd": (torch.arange(21).reshape(3, 7) % 2).to(dtype),
    }
    save_file(tensors, plain / "model.safetensors")
    checkpoint = Checkpoint(plain)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == dtype


def test_a_tensor_is_a_private_copy_and_nothing_stays_mapped(plain):
    checkpoint = Checkpoint(plain)
    first = checkpoint.tensor(NAME)
    before = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.tensor(NAME), before)
    assert str(plain) not in Path("/proc/self/maps").read_text()


def test_only_the_requested_rows_are_read_in_their_order(plain, monkeypatch):
    checkpoint = Checkpoint(plain)
    name = "model.embed_tokens.weight"
    table = checkpoint.tensor(name)
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail(f"read all of {self.file}"))
    for index in ([5, 3, 3, 95, 4], [0], [], list(range(96))):
        rows = checkpoint.rows(name, torch.tensor(index, dtype=torch.long))
        assert torch.equal(rows, table[index])
    for wrong in (96, -1):
        with pytest.raises(UserError, match=f"row {wrong} of {name}"):
            checkpoint.rows(name, torch.tensor([1, wrong]))


@pytest.mark.parametrize(("family", "width"), [("mixtral", 32), ("qwen3_moe", 32)])
def test_fused_experts_appear_one_by_one_under_the_usual_names(family, width, tmp_path):
    """save_original_format=False keeps transformers' own fused parameters."""
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "single")
    fused, single = Checkpoint(tmp_path / "fused"), Checkpoint(tmp_path / "single")
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "fused/model.safetensors"))
    assert fused.names == single.names
    for name in single.names:
        assert torch.equal(fused.tensor(name), single.tensor(name))
    last = "block_sparse_moe.experts.3.w2" if family == "mixtral" else "mlp.experts.3.down_proj"
    assert fused.shape(f"model.layers.1.{last}.weight") == (64, width)


@pytest.mark.parametrize(("fixture", "zero"), [("packed", 0), ("packed_with_zeros", 1)])
def test_packed_weights_are_read_unpacked(fixture, zero, checkpoints, request):
    packed = request.getfixturevalue(fixture)
    checkpoint = Checkpoint(packed)
    original = load_file(checkpoints("llama") / "model.safetensors")
    raw = load_file(packed / "model.safetensors")
    assert checkpoint.is_compressed
    assert checkpoint.names == sorted(original)
    for name, bits, shift in ((NAME, 4, zero), (NAME.replace("up", "down"), 3, 0)):
        module = name.removesuffix(".weight")
        assert checkpoint.quantization(name).num_bits == bits
        scale = raw[f"{module}.weight_scale"]
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        size = 32 if bits == 4 else original[name].shape[1]
        groups = original[name].unflatten(1, (-1, size))
        codes = (groups / scale[..., None] + shift).round().clamp(low, high)
        by_hand = ((codes - shift) * scale[..., None]).flatten(1)
        torch.testing.assert_close(checkpoint.tensor(name), by_hand)
        assert checkpoint.shape(name) == tuple(original[name].shape)
        leaves = [leaf for leaf in raw if leaf.startswith(f"{module}.") and not leaf.endswith("shape")]
        assert len(leaves) == 2 + shift
        assert checkpoint.stored_bytes(name) == sum(raw[leaf].nbytes for leaf in leaves)
        assert checkpoint.nbytes(name) == original[name].nbytes
        assert torch.equal(checkpoint.rows(name, torch.tensor([2, 0])), checkpoint.tensor(name)[[2, 0]])
    left_alone = "model.layers.0.self_attn.o_proj.weight"
    assert checkpoint.quantization(left_alone) is None
    assert torch.equal(checkpoint.tensor(left_alone), original[left_alone])


def test_other_quantizations_are_refused(packed, tmp_path):
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())

    def change(**section: object) -> None:
        changed = {**config, "quantization_config": {**config["quantization_config"], **section}}
        (copy / "config.json").write_text(json.dumps(changed))

    change(quant_method="gptq")
    refused(copy, "'gptq'", "compressed-tensors", "config.json")
    group = {**config["quantization_config"]["config_groups"]["group_0"], "format": "marlin-24"}
    change(config_groups={"group_0": group})
    refused(copy, "marlin-24", "pack-quantized", "nvfp4-pack-quantized")
    change(sparsity_config={"format": "sparse-24-bitmask"})
    refused(copy, "sparse-24-bitmask", "not supported")
    change(config_groups={"group_0": {"targets": 3}})
    refused(copy, "config.json", "not valid")
    change(ignore=[NAME.removesuffix(".weight")])
    with pytest.raises(UserError, match=r"up_proj\.weight_packed .* no config group"):
        Checkpoint(copy).tensor(NAME)


def test_folders_without_a_checkpoint_are_refused(tmp_path, plain):
    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    refused(tmp_path / "plain" / "config.json", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty has no config.json")
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    refused(plain, ".bin", "safetensors")
    (plain / "pytorch_model.bin").unlink()
    refused(plain, "neither model.safetensors nor model.safetensors.index.json")
    (plain / "config.json").write_text("{")
    refused(plain, "config.json is not valid JSON")
    (plain / "config.json").write_text("[]")
    refused(plain, "config.json holds a list")


def test_truncated_shards_are_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 40, 5, 0):
        shard.write_bytes(content[:size])
        refused(sharded, shard.name, "truncated")
    shard.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    refused(sharded, shard.name, "truncated or not a safetensors file")
    shard.write_bytes((10).to_bytes(8, "little") + b"{not json}")
    refused(sharded, shard.name, "header cannot be read")


def test_a_missing_shard_and_a_wrong_index_are_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][NAME]
    other = next(file for file in index["weight_map"].values() if file != shard)
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**index["weight_map"], NAME: other}})
    )
    refused(sharded, NAME, other)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    refused(sharded, "index.json has no weight_map")
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / shard).unlink()
    refused(sharded, shard, "missing")


def test_headers_that_contradict_themselves_are_named(plain):
    file = plain / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def change(**entry: object) -> None:
        raw = json.dumps({**header, NAME: {**header[NAME], **entry}}).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    change()
    assert Checkpoint(plain).shape(NAME) == (128, 64)
    change(shape=[128, 65])
    refused(plain, NAME, "bytes")
    change(dtype="F4")
    refused(plain, NAME, "F4", "BF16")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-torch.inf, "inf")])
def test_weights_that_are_not_finite_are_named(plain, value, kind):
    checkpoint = Checkpoint(plain)
    tensor = checkpoint.tensor(NAME)
    checkpoint.check_finite(tensor, NAME)
    checkpoint.check_finite(torch.empty(0), "empty")
    checkpoint.check_finite(torch.tensor([1]), "integers")
    for dtype in (torch.float32, torch.bfloat16):
        bad = tensor.to(dtype)
        bad[3, 4] = value
        with pytest.raises(UserError, match=f"tensor {NAME} .* {kind}"):
            checkpoint.check_finite(bad, NAME)


def test_an_unknown_name_is_named(plain):
    with pytest.raises(UserError, match=r"tensor model\.nothing is missing"):
        Checkpoint(plain).tensor("model.nothing")


def test_the_fingerprint_follows_content_and_not_place(plain, tmp_path):
    print_of = Checkpoint(plain).fingerprint
    first = print_of()
    assert first == print_of()
    assert Checkpoint(shutil.copytree(plain, tmp_path / "moved")).fingerprint() == first
    tensors = load_file(plain / "model.safetensors")
    seen = {first}
    for row in (0, 63, 127):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed[NAME][row] += 1
        save_file(changed, plain / "model.safetensors", {"format": "pt"})
        seen.add(Checkpoint(plain).fingerprint())
    (plain / "config.json").write_text((plain / "config.json").read_text() + "\n")
    seen.add(Checkpoint(plain).fingerprint())
    assert len(seen) == 5


def test_models_are_resolved_to_folders(tmp_path, monkeypatch):
    assert resolve("embedded:draft") == embedded.path("draft")
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "file").touch()
    asked = []
    for wrong in ("embedded:none", "nowhere", "org/nowhere", "/nowhere/at/all", "./x", "", "file"):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name))
        with pytest.raises(UserError) as caught:
            resolve(wrong)
        assert repr(wrong) in str(caught.value)
    assert asked == []


def test_hub_names_are_downloaded_without_other_formats(tmp_path, monkeypatch):
    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "some-org/some-model"
        assert "*.safetensors" in allow_patterns
        assert "*.bin" not in allow_patterns
        assert "consolidated*" in ignore_patterns
        for terms in ("LICENSE", "License.md", "license-apache", "Llama-LICENSE.pdf", "THIRD_PARTY_NOTICES", "COPYING"):
            assert list(filter_repo_objects([terms], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("some-org/some-model") == tmp_path

    def fail(name: str, **_: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        resolve("some-org/some-model")
    assert "some-org/some-model" in str(caught.value)
    assert "\n" not in str(caught.value)
