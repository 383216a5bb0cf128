"""The speculators format: its names and shapes, what it cannot express, and the package's own logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.heads.eagle import EagleDrafter
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts, TargetWeights
from hasten.accel.training.heads.eagle import Eagle
from hasten.accel.training.heads.layouts.base import CONFIG
from hasten.accel.training.heads.layouts.loading import layout_of, layouts
from tests.decoding.drafters.heads.untrained import DRAFT_IDS, network_of
from tests.training.heads.test_draft_heads import batch_of

FACTS = TargetFacts.of(resolve("embedded:target"))
EMBEDDING = TargetWeights.of(resolve("embedded:target")).embedding
LAYOUT = layouts()["speculators"]
HEAD = Eagle(ttt_steps=3, decay=0.7, intermediate_size=96, normed_residual=True)


@pytest.fixture(scope="module")
def network():
    network = network_of(HEAD).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()  # what the file holds
    return network


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculators")
    LAYOUT.write(network, HEAD, folder, FACTS, str(resolve("embedded:target")))
    return folder


def logits(head, network):
    with torch.no_grad():
        return head.teacher_forced(network, batch_of(head))


def changed(folder: Path, tmp_path: Path, **settings):
    """A copy of the folder with other settings; those of the layer as `layer_NAME`."""
    config = json.loads((folder / CONFIG).read_text())
    for name, value in settings.items():
        where = config["transformer_layer_config"] if name.startswith("layer_") else config
        where[name.removeprefix("layer_")] = value
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path


def test_tensors_have_the_names_and_shapes_of_the_format(folder):
    size, head_dim, wide = FACTS.hidden_size, FACTS.head_dim, HEAD.intermediate_size
    layer = "layers.0."
    expected = {
        "d2t": (DRAFT_IDS,),
        "t2d": (FACTS.vocabulary,),
        "embed_tokens.weight": (FACTS.vocabulary, size),
        "fc.weight": (size, 3 * size),
        layer + "hidden_norm.weight": (size,),
        layer + "input_layernorm.weight": (size,),
        layer + "mlp.down_proj.weight": (size, wide),
        layer + "mlp.gate_proj.weight": (wide, size),
        layer + "mlp.up_proj.weight": (wide, size),
        layer + "post_attention_layernorm.weight": (size,),
        layer + "self_attn.k_proj.weight": (FACTS.kv_heads * head_dim, 2 * size),
        layer + "self_attn.o_proj.weight": (size, FACTS.heads * head_dim),
        layer + "self_attn.q_proj.weight": (FACTS.heads * head_dim, 2 * size),
        layer + "self_attn.v_proj.weight": (FACTS.kv_heads * head_dim, 2 * size),
        "lm_head.weight": (DRAFT_IDS, size),
        "norm.weight": (size,),
    }
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    ids = tensors["d2t"] + torch.arange(DRAFT_IDS)
    assert tensors["t2d"].dtype == torch.bool
    assert torch.equal(tensors["t2d"].nonzero().flatten(), ids)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt", "transformers refuses other files"


def test_a_folder_gives_back_the_head_and_its_logits(folder, network):
    assert layout_of(folder) is LAYOUT
    head, again = LAYOUT.read(folder, FACTS)
    again.attach(EMBEDDING)
    assert head == HEAD
    assert all(torch.equal(*pair) for pair in zip(logits(HEAD, network), logits(head, again), strict=True))


def test_a_drafter_loads_the_folder(folder, network):
    models = Models(FACTS.vocabulary, target_path=resolve("embedded:target"))
    memory = EagleDrafter(head=str(folder)).new_memory(models)
    assert memory.layers == HEAD.layers(FACTS)
    assert memory.network.max_depth == HEAD.ttt_steps
    assert memory.ids == network.vocabulary.ids.tolist()


def test_another_embedding_than_the_targets_is_used(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / CONFIG).symlink_to(folder / CONFIG)
    _, again = LAYOUT.read(tmp_path, FACTS)
    again.attach(EMBEDDING)
    ids = torch.arange(FACTS.vocabulary)
    assert torch.equal(again.embed(ids), tensors["embed_tokens.weight"].float())


def test_a_full_vocabulary_has_no_maps(tmp_path):
    head = Eagle(ttt_steps=1)
    whole = head.build(replace(FACTS, vocabulary=DRAFT_IDS), network_of(head).vocabulary.full(DRAFT_IDS))
    LAYOUT.write(whole, head, tmp_path, replace(FACTS, vocabulary=DRAFT_IDS), "org/target")
    assert not {"d2t", "t2d", "embed_tokens.weight"} & load_file(tmp_path / "model.safetensors").keys()
    _, again = LAYOUT.read(tmp_path, replace(FACTS, vocabulary=DRAFT_IDS))
    assert torch.equal(again.vocabulary.ids, torch.arange(DRAFT_IDS))


def test_the_state_after_the_final_norm_cannot_be_written(tmp_path):
    head = Eagle(feature_layers=(0, 2, -1))
    with pytest.raises(UserError, match="feature_layers="):
        LAYOUT.write(network_of(head), head, tmp_path, FACTS, "org/target")
    assert not list(tmp_path.iterdir())


def test_another_target_than_the_heads_own_is_not_named(network, tmp_path):
    with pytest.raises(UserError, match="is another model than the one that the head"):
        LAYOUT.write(network, HEAD, tmp_path, FACTS, str(resolve("embedded:draft")))


@pytest.mark.parametrize(
    "setting",
    [
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"norm_output": True},
        {"target_hidden_size": 7},
        {"speculators_model_type": "dflash"},
        {"eagle_aux_hidden_state_layer_ids": [1, 2]},
        {"layer_num_hidden_layers": 2},
        {"layer_model_type": "qwen3"},
        {"layer_rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_our_head_lacks_is_named(setting, folder, tmp_path):
    name, value = next(iter(setting.items()))
    named = (
        "rope_type=llama3"
        if "rope" in name
        else name.removeprefix("layer_") + (f"={value}" if type(value) is not list else "=2")
    )
    with pytest.raises(UserError, match=named):
        LAYOUT.read(changed(folder, tmp_path, **setting), FACTS)


def test_a_head_of_another_target_is_refused(folder):
    with pytest.raises(UserError, match="hidden_size"):
        LAYOUT.read(folder, replace(FACTS, hidden_size=64))
    with pytest.raises(UserError, match="fingerprint"):
        LAYOUT.read(folder, replace(FACTS, fingerprint="another"))


def test_layers_that_a_folder_does_not_name_are_the_formats_own(folder, tmp_path):
    deep = replace(FACTS, layers=30)
    named = changed(folder, tmp_path, eagle_aux_hidden_state_layer_ids=None)
    head, _ = LAYOUT.read(named, deep)
    assert head.layers(deep) == (2, 15, 27)


def test_sizes_that_the_package_leaves_out_are_the_defaults_of_transformers(tmp_path):
    facts = replace(FACTS, rms_norm_eps=1e-6, rope_theta=1e4)
    head = Eagle(ttt_steps=1)
    LAYOUT.write(network_of(head), head, tmp_path, facts, "org/target")
    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ("rms_norm_eps", "rope_theta", "head_dim", "hidden_act"):
        del config["transformer_layer_config"][name]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert LAYOUT.read(tmp_path, facts)[0] == head


@pytest.fixture
def package(folder):
    """The package's model of the folder, in float32."""
    pytest.importorskip("speculators", reason="needs the package speculators 0.9.0")
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return Eagle3DraftModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def test_the_package_computes_the_same_logits(package, network):
    batch, made = batch_of(HEAD), []
    package.lm_head.register_forward_hook(lambda _, __, output: made.append(output[0]))
    for row, tokens in enumerate(batch.tokens):
        made.clear()
        documents = torch.zeros(1, len(tokens) - 1, dtype=torch.long)
        with torch.no_grad():
            package(batch.features[row, None, :-1], tokens[None, 1:], documents, ttt_steps=HEAD.ttt_steps)
        for ours, theirs in zip(logits(HEAD, network), made, strict=True):
            # float32 sums in another order: 7e-6 was seen, of logits up to 14.
            torch.testing.assert_close(theirs[: ours.shape[1]], ours[row], rtol=1e-4, atol=1e-4)


def test_what_the_package_writes_is_read(package, network, tmp_path):
    package.save_pretrained(tmp_path)
    head, again = LAYOUT.read(tmp_path, FACTS)
    again.attach(EMBEDDING)
    assert head == replace(HEAD, decay=Eagle.decay), "the format has no decay"
    assert all(torch.equal(*pair) for pair in zip(logits(HEAD, network), logits(head, again), strict=True))
