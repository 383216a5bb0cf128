"""LServe's streaming heads: which they are, what they hold, and that it is all they hold."""

import pytest
import torch

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.retrieve.lserve import LServe, Pages
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import PLAIN

HEADS, TOKENS, SIZE = 2, 40, 8
METHOD = LServe(page=8, parts=2, recent=4, sinks=3, local=10, window=4)


def layer(number, middle, tokens=TOKENS, memory=None, segments=(), start=0):
    """A layer whose queries attend to the first token, and in the heads `middle` to one in the middle instead."""
    generator = torch.Generator().manual_seed(number)
    keys, values = (0.1 * torch.randn(HEADS, tokens, SIZE, generator=generator) for _ in range(2))
    for head in range(HEADS):
        keys[head, 20 if head in middle else 0, 0] = 30.0
    queries = torch.zeros(4, HEADS * 2, SIZE)
    queries[..., 0] = 1.0
    positions = torch.arange(start, start + tokens, dtype=torch.int32)
    place = Place(number, 2, start + tokens, 8, PLAIN)
    return list(segments), Recent(keys, values, positions, queries, None, memory), place


def test_heads_that_attend_to_the_first_and_last_tokens_stream_wherever_in_the_model_they_are():
    given = [layer(0, middle=[0, 1]), layer(1, middle=[])]
    gates = torch.cat([METHOD.gates(*one) for one in given])
    # A score of 30 / sqrt(8) against at most some tenths: nearly all attention is on one token.
    torch.testing.assert_close(gates, torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=0.01)
    kept = METHOD.compress_layers(given)
    assert [one.memory.tolist() for one in kept] == [[False, False], [True, True]]
    one = LServe(**{**vars(METHOD), "streaming_heads": 0.25}).compress_layers(given)
    assert sum(int(part.memory.sum()) for part in one) == 1


def test_streaming_heads_hold_sinks_and_local_tokens_and_the_others_all():
    given = [layer(0, middle=[1]), layer(1, middle=[0])]
    for number, one in enumerate(METHOD.compress_layers(given)):
        (segment,) = one.segments
        pages, local = segment.parts
        assert one.recent == 4
        assert isinstance(pages, Pages)
        assert (segment.heads[0].tolist(), segment.heads[1].tolist()) == ([1 - number], [number])
        assert pages.positions.tolist() == [list(range(36))]
        # The first three, and the last ten without the four that are dense.
        assert local.positions.tolist() == [[0, 1, 2, 30, 31, 32, 33, 34, 35]]
        assert local.nbytes == 9 * (2 * SIZE * 4 + 4)
        later = METHOD.compress_layers([layer(number, [], 12, one.memory, one.segments, TOKENS)])[0]
        assert later.segments[0].parts[1].positions.tolist() == [[0, 1, 2, *range(42, 48)]]
        # The dense tokens of before are not those of the helper: 36 in the segment, then 8 of 12.
        assert later.segments[0].parts[0].tokens == 44


def test_attention_over_groups_of_heads_is_that_of_each_head():
    (kept, _) = METHOD.compress_layers([layer(0, middle=[0]), layer(1, middle=[0])])
    (segment,) = kept.segments
    queries = torch.randn(3, HEADS * 2, SIZE, generator=torch.Generator().manual_seed(5))
    at = torch.arange(40, 43)
    whole = segment.attend(queries, at, PLAIN)
    for heads, part in zip(segment.heads, segment.parts, strict=True):
        own = slice(2 * int(heads), 2 * int(heads) + 2)
        alone = part.attend(queries[:, own], at, PLAIN)
        for name in ("o", "m", "l"):
            torch.testing.assert_close(getattr(whole, name)[:, own], getattr(alone, name))


def test_nothing_is_dropped_while_the_budget_or_sinks_and_local_tokens_hold_all():
    for method, budget in ((METHOD, 40), (LServe(page=8, recent=4, sinks=20, local=20), 8)):
        given = [
            (before, recent, Place(0, 2, TOKENS, budget, PLAIN)) for before, recent, _ in (layer(0, []), layer(1, []))
        ]
        for one in method.compress_layers(given):
            assert one.memory is None
            assert isinstance(one.segments[0], Dense)
            assert one.segments[0].tokens == 36


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [({"streaming_heads": 1.5}, "cache.streaming_heads=1.5"), ({"local": 8}, "cache.local >= cache.recent=32")],
)
def test_a_wrong_value_is_named(changes, wrong):
    with pytest.raises(UserError, match=wrong):
        LServe(**changes)
