"""Sites of scales in blocks of families that no list names."""

import pytest
import torch
import transformers
from torch import nn

from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.scale_sites import _is_linear_in_up

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "eos_token_id": 2,
}
ATTENTION, NETWORK = "input_layernorm", "post_attention_layernorm"


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("GraniteConfig", {}, [ATTENTION, NETWORK, "self_attn.o_proj", "mlp.down_proj"]),
        # Clamps the up projection and adds one to it; its attention has sinks.
        ("GptOssConfig", {"num_local_experts": 4, "head_dim": 32}, [ATTENTION, NETWORK]),
        # Norms behind attention and network only.
        ("Olmo2Config", {}, ["self_attn.o_proj", "mlp.down_proj"]),
        # One norm for both, without a second one.
        ("StableLmConfig", {"use_parallel_residual": True}, ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_sites_are_where_a_block_allows_them(name, own, expected, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**COMMON, **own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    architecture = Architecture(Checkpoint(tmp_path))
    assert [site.key for site in architecture.scale_sites(1)] == [f"model.layers.1.{path}" for path in expected]


class Network(nn.Module):
    """A gated network with a function of its up projection."""

    def __init__(self, change):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4, device="meta") for _ in range(3))
        self.change = change

    def forward(self, inputs):
        return self.down_proj(torch.sigmoid(self.gate_proj(inputs)) * self.change(self.up_proj(inputs)))


@pytest.mark.parametrize(
    ("change", "linear"),
    [
        (lambda up: 2 * up, True),
        (lambda up: up + 1, False),
        (lambda up: up.clamp(-7, 7), False),
        (lambda up: up.square(), False),
    ],
)
def test_networks_are_tried_for_whether_they_are_linear_in_their_up_projection(change, linear):
    network = Network(change)
    modules = dict(network.named_modules())
    assert _is_linear_in_up(network) is linear
    assert dict(network.named_modules()) == modules
