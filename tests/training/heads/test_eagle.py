"""EAGLE: which layers it reads, and what its steps attend to."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.eagle import Eagle, attend_unrolled, learned_rows
from hasten.accel.training.objectives.by_depth import DepthLoss
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of

FACTS = TargetFacts.of(resolve("embedded:target"))


def test_layers_are_the_papers_where_they_differ_and_others_in_a_shallow_target():
    assert Eagle().layers(replace(FACTS, layers=30)) == (2, 15, 27)
    assert Eagle().layers(replace(FACTS, layers=7)) == (2, 3, 4)
    assert Eagle().layers(replace(FACTS, layers=4)) == (1, 2, 3)
    assert Eagle().layers(replace(FACTS, layers=1)) == (0, 0, 0)


def test_a_layer_that_the_target_lacks_is_named():
    with pytest.raises(UserError, match="the target has 4 layers"):
        Eagle(feature_layers=(1, 2, 4)).layers(replace(FACTS, layers=4))


def test_a_step_attends_to_the_context_and_to_its_own_steps_only():
    generator = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads, size = 5, 4, 2, 8
    queries = torch.randn(1, tokens, heads, size, generator=generator)
    context, *own = torch.randn(3, 1, tokens, 2, kv_heads, size, generator=generator)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    found = attend_unrolled(queries, context, own, mask).view(tokens, heads, size)
    for token in range(tokens):
        for head in range(heads):
            seen = torch.cat([context[0, : token + 1], *(each[0, token : token + 1] for each in own)])
            keys, values = seen[:, :, head // (heads // kv_heads)].unbind(1)
            probs = (keys @ queries[0, token, head] / size**0.5).softmax(0)
            torch.testing.assert_close(found[token, head], probs @ values)


def test_what_a_draft_reads_is_the_text_so_far_and_no_later_hidden_state():
    head = Eagle()
    network, batch = network_of(head).eval(), batch_of(head)
    features = batch.features.clone()
    features[:, 5:] += 1
    with torch.no_grad():
        one = head.teacher_forced(network, batch)
        two = head.teacher_forced(network, replace(batch, features=features))
    for before, after in zip(one, two, strict=True):
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.allclose(before[:, 5], after[:, 5])


def test_rows_that_are_not_learned_are_not_run_and_change_no_loss():
    head = Eagle(ttt_steps=3)
    network, batch = network_of(head).eval(), batch_of(head, ((5, 7, 4), (9, 3, 4)))
    learned = torch.zeros(2, 16, dtype=torch.bool)
    # An answer at the end of a document, one inside, and one that is cut off by the end of the window.
    learned[0, 3:5] = learned[0, 9:12] = learned[1, 6:9] = learned[1, 14:] = True
    batch = replace(batch, learned=learned)
    rows, counted = learned_rows(batch, 3)
    assert [row[own].tolist() for row, own in zip(rows, counted, strict=True)] == [
        [0, 1, 2, 5, 6, 7, 8, 9],
        [2, 3, 4, 5, 6, 12, 13],
    ]
    whole = DepthLoss(network.vocabulary, head.decay)
    with torch.no_grad():
        for depth, logits in enumerate(head.teacher_forced(network, batch), 1):
            targets = batch.at_depth(depth)
            whole.add(depth, logits[targets.valid], targets)
        loss = head.loss(network, batch)
    torch.testing.assert_close(loss.value, whole.loss().value)
    torch.testing.assert_close(dict(loss.parts), dict(whole.loss().parts))
