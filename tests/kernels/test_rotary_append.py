"""Rotary embedding and writing into the cache."""

import pytest
import torch

from hasten.kernels.rotary_append import rotary_append

# At position 1, the first pair turns by 90 degrees and the second by 180.
CIS = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0]]])


def run(interleaved, cis=CIS, **options):
    """Query and cache after one token, whose query, key and value are 1, 2, 3, 4."""
    qkv = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 3, 4)
    cache = torch.zeros(2, 2, 3, 4)
    one = torch.ones(1, dtype=torch.int64)
    return rotary_append(qkv, cis, one, cache, one, 2 * one, interleaved=interleaved, **options), cache


def test_queries_and_keys_turn_and_values_do_not():
    for interleaved, turned in ((True, [-2.0, 1.0, -3.0, -4.0]), (False, [-3.0, -2.0, 1.0, -4.0])):
        queries, cache = run(interleaved)
        assert queries.tolist() == [[turned]]
        assert cache[1, :, 2].tolist() == [turned, [1.0, 2.0, 3.0, 4.0]]
        assert int(cache.count_nonzero()) == 8


def test_the_conventions_are_those_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    both = torch.cat([angles, angles], -1)[None]
    queries, keys = (part.transpose(0, 1)[None] for part in (qkv[:, :2], qkv[:, 2:3]))
    expected, expected_keys = apply_rotary_pos_emb(queries, keys, both.cos(), both.sin())
    cache, places = torch.zeros(1, 2, 3, 8), torch.arange(3)
    cis = torch.stack([angles.cos(), angles.sin()], -1)
    found = rotary_append(qkv, cis, places, cache, torch.zeros_like(places), places, interleaved=False)
    torch.testing.assert_close(found.transpose(0, 1)[None], expected)
    torch.testing.assert_close(cache[:, :1], expected_keys)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ValueError, match="at least the 8 rotated dimensions, got 4"):
        run(True, cis=torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match="query_norm and key_norm must be given together"):
        run(True, query_norm=torch.ones(4))
