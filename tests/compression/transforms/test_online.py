"""Rotations of the inputs of down projections, which run with the model."""

import importlib
import json

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hasten.accel.activations.hadamard import InputHadamard, hadamard_of
from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.levels.schemes import SCHEMES
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.awq import AWQ
from hasten.accel.compression.transforms.quarot import QuaRot, hadamard_rotation
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint, Rotation
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.jobs.common.loading import loader_of, print_loader
from tests.compression import local
from tests.models import tiny

TOKENS = tiny.tokens()
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def loader(monkeypatch):
    """hasten's loader, for one test."""
    module = importlib.import_module("hasten.accel.models.transformers_loader")
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", module._Config)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "compressed-tensors", module.Loader)


def logits(architecture, tokens=TOKENS):
    hidden = architecture.embed(tokens)
    for block in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(block), block, hidden)
    return architecture.head(hidden)


def compressed(source, output, scheme="w8a8", transform=None, tokens=TOKENS, **changes):
    values = {"level": parse_level(SCHEMES[scheme]), "transforms": (transform or QuaRot(online=True),)}
    local.compress(local.settings(source, output, RoundToNearest(), **(values | changes)), tokens)
    return output


@pytest.mark.parametrize("size", [1, 8, 128])
def test_the_matrix_is_the_one_that_loaders_build(size):
    rotation = InputHadamard(size)
    expected = deterministic_hadamard_matrix(size, torch.float32)
    assert torch.equal(rotation.matrix(), expected)
    inputs = torch.randn(2, 3, 2 * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_block = inputs.unflatten(-1, (2, size)) @ expected.double() / size**0.5
    torch.testing.assert_close(rotation(inputs), by_block.flatten(-2))
    torch.testing.assert_close(rotation(rotation(inputs)), inputs)


def test_a_gradient_is_that_of_the_product():
    inputs = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(InputHadamard(4), inputs)


def test_blocks_are_the_largest_powers_of_two_that_divide_the_channels():
    sizes = {1536: 512, 11008: 256, 14336: 2048, 18944: 512, 8192: 8192, 1 << 16: 1 << 15}
    assert {columns: hadamard_of(columns).size for columns in sizes} == sizes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 96}),
        ("phi3", {}),
        ("gemma2", {"residual": False}),
    ],
)
def test_a_model_whose_inputs_are_rotated_has_the_logits_of_the_original(family, changes, tmp_path):
    parts = {name: changes.pop(name) for name in ("residual",) if name in changes}
    original = Architecture(Checkpoint(tiny.save(tmp_path, family, **changes)))
    rotation = hadamard_rotation(original, 0, online=True, **parts)
    view = RotatedCheckpoint(original, lambda: rotation, rotation.residual is not None, online=True)
    model = Architecture(view)
    # The projection alone, without the rotation of its inputs, is another one.
    assert model.input_rotations(0).keys() == {DOWN}
    folded = model.checkpoint.tensor(f"{DOWN}.weight")
    assert not torch.allclose(folded, original.checkpoint.tensor(f"{DOWN}.weight"), atol=0.01)
    # Sums of rotated and unrotated products round differently in float32.
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-4)


@torch.no_grad()
def power(model, weight, in_stages):
    """Mean squared products of rows of weight (R, C) with the inputs of the first down projection."""
    groups = make_layer_groups(model, parse_level("w8"), (), 0, 0)[0]
    shard, block = Shard(model, {0: TOKENS}, batch=2), model.load_block(0)
    if not in_stages:
        return shard.collect(block, groups)[DOWN].total().power(weight)
    staged = shard.begin(block, groups)
    for number, stage in enumerate(staged.stages):
        sums = staged.collect(number, [group.key for group in stage])
        staged.replace(())
    shard.finish()
    return sums[DOWN].total().power(weight)


@pytest.mark.parametrize("in_stages", [False, True])
def test_statistics_are_those_of_the_rotated_inputs(in_stages, tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, "llama")))
    model = Architecture(RotatedCheckpoint(original, lambda: Rotation(None, online=True), stream=False, online=True))
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    expected = power(original, InputHadamard(128)(weight), in_stages)
    # Sums of products in float32.
    torch.testing.assert_close(power(model, weight, in_stages), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of 8-bit weights and inputs, rotated online."""
    folder = tmp_path_factory.mktemp("online")
    return compressed(tiny.save(folder / "original", "llama", intermediate_size=96), folder / "out")


def test_the_config_is_that_of_llm_compressor_and_the_matrix_is_stored_once(written):
    described = json.loads((written / "config.json").read_text())["quantization_config"]["transform_config"]
    assert TransformConfig.model_validate(described).model_dump(mode="json") == described
    group = described["config_groups"]["R4"]
    targets = [r"re:(.*\.)?layers\.\d+\.mlp\.down_proj$"]
    assert [(apply["location"], apply["inverse"], apply["targets"]) for apply in group["apply"]] == [
        ("input", False, targets),
        ("weight_input", True, targets),
    ]
    assert (group["type"], group["head_dim"], group["randomize"]) == ("hadamard", 32, False)
    tensors = {name: tensor for file in written.glob("*.safetensors") for name, tensor in load_file(file).items()}
    stored = [name for name in tensors if "R4" in name]
    assert stored == [f"{DOWN}.R4_input.weight"]
    assert torch.equal(tensors[stored[0]], deterministic_hadamard_matrix(32, torch.float32))
    assert stored[0] not in Checkpoint(written)


def test_compressed_tensors_own_transforms_give_our_logits(written, tmp_path):
    section = json.loads((written / "config.json").read_text())["quantization_config"]
    checkpoint = Checkpoint(written)
    config = AutoConfig.from_pretrained(written)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    # As its loading does: transforms first, whose matrices are then loaded with the weights that hold their inverses.
    apply_transform_config(model, TransformConfig.model_validate(section["transform_config"]))
    tensors = {name: tensor for file in written.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {name: checkpoint.tensor(name).float() for name in checkpoint.names}
    weights |= {name: tensor for name, tensor in tensors.items() if "R4_input" in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # The second layer's matrix is the first one's.
    assert unexpected == []
    assert [name for name in missing if "R4_input" not in name] == []
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits
    ours = Architecture(checkpoint, as_served=False)
    torch.testing.assert_close(found, logits(ours), rtol=0, atol=1e-4)


def test_the_loader_gives_our_logits_and_transformers_alone_others(written, monkeypatch):
    ours = logits(Architecture(Checkpoint(written)))
    model, info = AutoModelForCausalLM.from_pretrained(
        written, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits
        # Of the inputs, those on the edge of two codes round differently.
        assert float((found - ours).square().mean()) < 1e-4 * float(ours.square().mean())
        for module in model.modules():
            vars(module).pop("input_rotation", None)
        alone = model(TOKENS, use_cache=False).logits
    assert float((alone - ours).square().mean()) > 0.1 * float(ours.square().mean())


def test_the_job_says_what_transformers_needs(written, capsys):
    assert loader_of(written) == "hasten.accel.models.transformers_loader"
    print_loader(loader_of(written), written)
    assert "it runs another model" in capsys.readouterr().out


def test_decoding_takes_the_path_that_rotates(tmp_path):
    source = tiny.save(tmp_path / "original", "llama")
    folder = compressed(source, tmp_path / "out", "w8a16", level=parse_level("w8g32"))
    with pytest.raises(UserError, match=r"path=fast cannot run .*inputs of its layers are rotated"):
        load_target(folder, torch.float32, path="fast")
    target = load_target(folder, torch.float32)
    assert isinstance(target, TransformersTarget)
    target.reserve(1, 32)
    tokens = TOKENS[0].tolist()
    found = target.forward([0], [tokens], [range(-1, len(tokens) - 1)]).logits[0]
    torch.testing.assert_close(found, logits(Architecture(Checkpoint(folder)))[0], rtol=1e-3, atol=1e-3)


def test_a_source_that_is_rotated_online_stays_so(written, tmp_path):
    config = json.loads((written / "config.json").read_text())
    with pytest.raises(UserError, match=r"inputs of model.layers.0.mlp.down_proj are rotated already"):
        compressed(_alone(written, tmp_path / "source"), tmp_path / "refused")
    again = compressed(tmp_path / "source", tmp_path / "again", transform=AWQ(grid=2))
    found = json.loads((again / "config.json").read_text())
    assert found["quantization_config"]["transform_config"] == config["quantization_config"]["transform_config"]
    expected = logits(Architecture(Checkpoint(written), as_served=False))
    error = logits(Architecture(Checkpoint(again), as_served=False)) - expected
    assert float(error.square().mean()) < 1e-2 * float(expected.square().mean())


def test_scales_of_channels_that_a_rotation_mixes_are_none_of_its_outputs(written):
    layers = []
    for folder in (written.parent / "original", written):
        sites = Architecture(Checkpoint(folder)).scale_sites(0)
        layers.append({layer.name for site in sites for layer in site.layers})
    assert layers[0] - layers[1] == {DOWN}


def _alone(folder, path):
    """The files of a checkpoint, without those of the run that made it."""
    path.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize(
    "changes",
    [{"type": "random-hadamard"}, {"randomize": True}, {"apply": [{"targets": ["Linear"], "location": "output"}]}],
)
def test_other_transforms_that_run_with_the_model_are_refused(written, changes, tmp_path):
    folder = _alone(written, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["R4"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"R4 in the transform_config of .* supported are transforms of type hadamard"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mixtral", "servers run all experts of a layer as one"), ("opt", "there is no down_proj whose inputs could be")],
)
def test_models_whose_inputs_servers_cannot_rotate_are_refused(family, reason, tmp_path):
    source = tiny.save(tmp_path / "original", family)
    with pytest.raises(UserError, match=f"{family} models cannot be rotated: {reason}"):
        compressed(source, tmp_path / "out", transform=QuaRot(residual=False, heads=False, online=True))


def test_an_odd_number_of_inputs_is_refused(tmp_path):
    source = tiny.save(tmp_path / "original", "llama", intermediate_size=63)
    with pytest.raises(UserError, match=r"down_proj has 63 inputs, an odd number"):
        compressed(source, tmp_path / "out")


def test_a_gguf_file_is_refused(tmp_path):
    from hasten.accel.compression.outputs.gguf import GgufOptions

    source = tiny.save(tmp_path / "original", "llama")
    with pytest.raises(UserError, match=r"format=gguf: inputs of model.layers.0.mlp.down_proj are rotated"):
        compressed(source, tmp_path / "out", gguf=GgufOptions(), level=parse_level("q4_0"))


def planted(folder, factor=40.0):
    """The embedded target with a few large inputs of each down projection, which its weights take back."""
    source = embedded.path("target")
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    channels = torch.arange(3, 896, 150)
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight"):
            tensor[channels] *= factor
        elif name.endswith("down_proj.weight"):
            tensor[:, channels] /= factor
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def test_outliers_of_the_down_projections_inputs_cost_less_where_they_are_rotated(tmp_path):
    (tmp_path / "planted").mkdir()
    source = planted(tmp_path / "planted")
    tokens = torch.randint(4096, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = logits(Architecture(Checkpoint(source)), tokens).log_softmax(-1)
    lost = {}
    for online in (False, True):
        folder = compressed(source, tmp_path / str(online), "w8a8", QuaRot(online=online), tokens)
        found = logits(Architecture(Checkpoint(folder)), tokens).log_softmax(-1)
        lost[online] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost[True] < 0.5 * lost[False], lost
