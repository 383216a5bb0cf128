"""Attention of heads: what is trained on windows equals what is used with a cache, and along the paths of a tree."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hasten.accel.training.heads.attention import Attention, DecoderLayer, KeyValueCache, block_causal
from hasten.accel.training.heads.draft_head import TargetFacts

FACTS = TargetFacts(
    vocabulary=50,
    hidden_size=24,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    max_length=512,
)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = DecoderLayer(FACTS).requires_grad_(False)
    for norm in (made.attention_norm, made.mlp_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    return made


def forward(layer, x, segments=None):
    """Outputs of windows x (B, T, D), by default of one document each."""
    segments = torch.zeros(x.shape[:2], dtype=torch.long) if segments is None else segments
    # Positions start at 0 in every document.
    positions = torch.stack([(row[:, None] == row).tril().sum(1) - 1 for row in segments])
    return layer(x, positions, block_causal(segments))


def test_the_layer_is_that_of_llama(layer):
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    config._attn_implementation = "sdpa"
    theirs = LlamaDecoderLayer(config, 0).requires_grad_(False)
    query, key, value = layer.attention.qkv.weight.split([48, 16, 16])
    gate, up = layer.mlp.gate_up.weight.chunk(2)
    theirs.load_state_dict(
        {
            "input_layernorm.weight": layer.attention_norm.weight,
            "post_attention_layernorm.weight": layer.mlp_norm.weight,
            "self_attn.q_proj.weight": query,
            "self_attn.k_proj.weight": key,
            "self_attn.v_proj.weight": value,
            "self_attn.o_proj.weight": layer.attention.out.weight,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.mlp.down.weight,
        }
    )
    x = torch.randn(2, 9, 24)
    rotation = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    expected = theirs(x, position_embeddings=rotation)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(forward(layer, x), expected)


def test_tokens_see_only_earlier_ones_of_their_document(layer):
    x = torch.randn(1, 11, 24)
    packed = forward(layer, x, torch.tensor([[3] * 4 + [7] * 5 + [-1] * 2]))
    assert packed.isfinite().all()
    torch.testing.assert_close(packed[:, :4], forward(layer, x[:, :4]))
    torch.testing.assert_close(packed[:, 4:9], forward(layer, x[:, 4:9]))


def test_reading_in_parts_gives_what_training_gives(layer):
    x = torch.randn(2, 150, 24)  # more than the cache's first capacity
    expected = forward(layer, x)
    caches = [KeyValueCache(), KeyValueCache()]
    starts = [0, 0]
    for counts in ([1, 4], [70, 1], [2, 100], [1, 1]):
        new = [x[row, start : start + count] for row, (start, count) in enumerate(zip(starts, counts, strict=True))]
        found = layer.extend(caches, torch.cat(new), counts, last_only=False)
        for row, part in enumerate(found.split(counts)):
            torch.testing.assert_close(part, expected[row, starts[row] : starts[row] + counts[row]])
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    assert [cache.length for cache in caches] == starts


def test_the_last_outputs_alone_are_those_among_all(layer):
    x = torch.randn(9, 24)
    alone = layer.extend([KeyValueCache(), KeyValueCache()], x, [5, 4])
    every = layer.extend([KeyValueCache(), KeyValueCache()], x, [5, 4], last_only=False)
    torch.testing.assert_close(alone, every[[4, 8]])


def test_nodes_of_a_tree_get_what_their_path_alone_gets(layer):
    x, nodes = torch.randn(2, 7, 24), torch.randn(5, 24)
    caches = [KeyValueCache(), KeyValueCache()]
    layer.extend(caches, torch.cat([x[0], x[1, :3]]), [7, 3])
    before = [cache.read().clone() for cache in caches]
    # Nodes 0 and 1 follow sequence 0, node 2 follows sequence 1; 3 is a child of 1, and 4 of 2.
    first, paths = layer.extend_path(caches, torch.tensor([0, 0, 1]), nodes[:3])
    second, _ = layer.extend_path(caches, torch.tensor([0, 1]), nodes[3:], paths[[1, 2]])
    for found, context, path in (
        (first[0], x[0], [0]),
        (first[1], x[0], [1]),
        (first[2], x[1, :3], [2]),
        (second[0], x[0], [1, 3]),
        (second[1], x[1, :3], [2, 4]),
    ):
        torch.testing.assert_close(found, forward(layer, torch.cat([context, nodes[path]])[None])[0, -1])
    assert all(torch.equal(cache.read(), held) for cache, held in zip(caches, before, strict=True))


def test_inputs_may_be_wider_than_the_target():
    torch.manual_seed(0)
    attention = Attention(FACTS, input_size=48).requires_grad_(False)
    x = torch.randn(1, 6, 48)
    expected = forward(attention, x)
    assert expected.shape == (1, 6, 24)
    cache = KeyValueCache()
    attention.extend([cache], x[0, :4], [4])
    torch.testing.assert_close(attention.extend([cache], x[0, 4:], [2]), expected[0, -1:])
