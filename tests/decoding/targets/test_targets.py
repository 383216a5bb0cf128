"""Both targets: nodes of a tree see their ancestors and nothing else, and what is committed is the sequence."""

import gc
import itertools

import pytest
import torch

from hasten.accel.decoding.targets.families import FAMILIES as FAST
from hasten.accel.decoding.targets.families import refusal
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from tests.models.tiny import FAMILIES, VOCABULARY, build

# Sums run in another order than over the whole sequence: a few roundings of logits of size 10.
TOLERANCE = 2e-4
PROMPT = [5, 17, 3, 60, 22, 9, 41, 8, 77, 30, 2, 54]
TOKENS = [11, 12, 13, 14, 15, 16]
PARENTS = [ROOT, 0, 0, 1, 2, 4]


def targets():
    cases = [(family, TransformersTarget) for family in FAMILIES]
    cases += [(family, FastTarget) for family in FAST]
    return [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in cases]


def made(family, kind):
    model = build(family)
    return model, FastTarget.of(model) if kind is FastTarget else kind(model)


def whole(model, tokens):
    """Logits of the last position of a sequence, without any cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def path(node):
    return [] if node == ROOT else [*path(PARENTS[node]), TOKENS[node]]


@pytest.mark.parametrize(("family", "kind"), targets())
def test_nodes_see_their_ancestors_alone(family, kind):
    model, target = made(family, kind)
    target.reserve(1, 40)
    target.prefill(0, PROMPT, chunk=5)
    logits = target.forward([0], [TOKENS], [PARENTS]).logits[0]
    for node in range(len(TOKENS)):
        torch.testing.assert_close(logits[node], whole(model, PROMPT + path(node)), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("family", "kind"), targets())
def test_a_committed_path_is_what_comes_next_sees(family, kind):
    model, target = made(family, kind)
    target.reserve(1, 40)
    target.prefill(0, PROMPT)
    target.forward([0], [TOKENS], [PARENTS])
    target.commit(0, [0, 2, 4, 5])  # nodes that lie apart
    kept = PROMPT + path(5)
    assert list(target.committed(0)) == kept
    logits = target.forward([0], [[20, 21]], [[ROOT, 0]]).logits[0]
    for count in (1, 2):
        expected = whole(model, kept + [20, 21][:count])
        torch.testing.assert_close(logits[count - 1], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("family", "kind"), targets())
def test_a_tree_may_grow_in_several_passes(family, kind):
    _, target = made(family, kind)
    target.reserve(1, 40)
    target.prefill(0, PROMPT)
    at_once = target.forward([0], [TOKENS], [PARENTS]).logits[0]
    target.commit(0, [])
    cuts = (0, 2, 3, 6)  # one pass is of one node, beside others that it must not see
    parts = [
        target.forward([0], [TOKENS[first:last]], [PARENTS[first:last]]) for first, last in itertools.pairwise(cuts)
    ]
    grown = torch.cat([part.logits[0] for part in parts])
    torch.testing.assert_close(grown, at_once, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("family", "kind"), targets())
def test_sequences_of_different_lengths_and_trees_run_in_one_pass(family, kind):
    model, target = made(family, kind)
    target.reserve(3, 40)
    prompts = [PROMPT, PROMPT[:4], PROMPT[2:9]]
    trees = [(TOKENS, PARENTS), ([11], [ROOT]), (TOKENS[:3], PARENTS[:3])]
    for slot, prompt in enumerate(prompts):
        target.prefill(slot, prompt)
    logits = target.forward(range(3), [tree[0] for tree in trees], [tree[1] for tree in trees]).logits
    for slot, prompt in enumerate(prompts):
        for node in range(len(trees[slot][0])):
            expected = whole(model, prompt + path(node))
            torch.testing.assert_close(logits[slot, node], expected, atol=TOLERANCE, rtol=TOLERANCE)
    # The last sequence moves into the first one's slot and goes on there, beside one that is not its neighbour.
    target.commit(2, [0])
    target.commit(1, [])
    target.swap(0, 2)
    logits = target.forward([0], [[20]], [[ROOT]]).logits[0, 0]
    torch.testing.assert_close(logits, whole(model, [*prompts[2], TOKENS[0], 20]), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [TransformersTarget, FastTarget])
def test_slots_that_are_no_neighbours_are_gathered(kind):
    model, target = made("llama", kind)
    target.reserve(3, 40)
    for slot, prompt in enumerate((PROMPT, PROMPT[:4], PROMPT[2:9])):
        target.prefill(slot, prompt)
    logits = target.forward([0, 2], [[11], [12]], [[ROOT], [ROOT]]).logits
    for row, tokens in enumerate(([*PROMPT, 11], [*PROMPT[2:9], 12])):
        torch.testing.assert_close(logits[row, 0], whole(model, tokens), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [TransformersTarget, FastTarget])
def test_a_sequence_that_was_cut_goes_on_otherwise(kind):
    model, target = made("llama", kind)
    target.reserve(1, 40)
    target.prefill(0, PROMPT)
    target.forward([0], [TOKENS], [PARENTS])
    target.cut(0, 6)
    target.prefill(0, [90, 91])
    found = target.forward([0], [[92]], [[ROOT]]).logits[0, 0]
    expected = whole(model, [*PROMPT[:6], 90, 91, 92])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 24, 25, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_plain_ones(rows, dtype):
    from hasten.accel.decoding.targets.matmul import Weight

    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    weight = weight.to(dtype).float()  # what bfloat16 holds takes another way
    x = torch.randn(rows, 32, generator=generator)
    for packs in (True, False):
        torch.testing.assert_close(Weight(weight, bias, packs)(x), x @ weight.T + bias, atol=1e-4, rtol=1e-4)


def test_room_for_packed_weights_is_given_back(monkeypatch):
    from hasten.accel.decoding.targets import matmul

    if matmul._MKL_LINEAR is None:
        pytest.skip("torch was built without MKL")
    gc.collect()
    held = matmul.Weight._packed_bytes
    monkeypatch.setattr(matmul, "_MAX_BYTES", held + 48 * 32 * 4)
    assert matmul.Weight(torch.ones(48, 32, dtype=torch.bfloat16))._packed is None, "takes no room"
    for _ in range(2):
        weight = matmul.Weight(torch.full((48, 32), 0.1))
        assert weight._packed is not None
        assert matmul.Weight(torch.full((48, 32), 0.1))._packed is None, "there is room for one"
        del weight
    assert matmul.Weight._packed_bytes == held


def test_the_norm_in_few_operations_is_the_norm():
    from hasten.accel.decoding.targets.matmul import Norm

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(40, generator=generator), torch.randn(5, 40, generator=generator)
    expected = torch.nn.functional.rms_norm(x, (40,), weight, 0.1)
    torch.testing.assert_close(Norm(weight, 0.1)(x), expected)


def test_a_full_cache_is_refused():
    _, target = made("llama", FastTarget)
    target.reserve(1, 8)
    with pytest.raises(UserError, match=r"12 tokens do not fit the cache's capacity=8"):
        target.prefill(0, PROMPT)


def test_what_the_fast_path_cannot_run_is_named():
    assert "opt is none of llama" in refusal(build("opt").config)
    assert refusal(build("llama").config) is None
    with pytest.raises(UserError, match="path=fast cannot run"):
        FastTarget.of(build("opt"))


def test_caches_are_counted_in_bytes():
    _, target = made("llama", FastTarget)
    target.reserve(2, 10)
    # 2 layers, keys and values of 2 heads of size 16, float32.
    assert target.token_bytes == 2 * 2 * 2 * 16 * 4
    assert target.cache_bytes == 2 * 10 * target.token_bytes
    other = made("llama", TransformersTarget)[1]
    other.reserve(2, 10)
    other.prefill(0, PROMPT[:4])
    assert (other.token_bytes, other.cache_bytes) == (target.token_bytes, target.cache_bytes)
    assert target.vocabulary == VOCABULARY


@pytest.mark.parametrize(("family", "kind"), targets())
def test_the_bytes_of_a_token_are_those_of_the_caches(family, kind):
    _, target = made(family, kind)
    counted = target.token_bytes
    target.reserve(2, 20)
    target.prefill(0, PROMPT)
    assert target.cache_bytes == 2 * 20 * counted


@pytest.mark.slow
def test_the_compiled_path_gives_the_same_logits():
    model = build("llama")
    plain, compiled = FastTarget.of(model), FastTarget.of(model, compiled=True)
    found = []
    for target in (plain, compiled):
        target.reserve(1, 300)
        target.prefill(0, PROMPT)
        found.append(target.forward([0], [TOKENS], [PARENTS]).logits)
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE, rtol=TOLERANCE)
