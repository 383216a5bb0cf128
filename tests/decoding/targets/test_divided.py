"""Targets of several processes: what one does, the others repeat. Here the other one is in this process, too."""

import torch
from transformers import AutoModelForCausalLM

from hasten.accel.decoding.targets.divided import DividedTarget, LeadingTarget
from hasten.accel.decoding.targets.virtual import EmbeddedTokens
from hasten.accel.models.checkpoint import resolve


def test_a_pass_with_virtual_tokens_is_the_same_in_the_process_that_repeats_it():
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32).eval()
    follower = DividedTarget(model)
    passes, sent = [], []

    def send(calls):
        sent.append([name for name, _ in calls])
        for name, arguments in calls:
            if name == "forward":
                passes.append(follower.forward(*arguments))
            else:
                follower.repeat([(name, arguments)])

    leader = LeadingTarget(model, send)
    vocabulary = leader.vocabulary
    with torch.no_grad():
        leader.reserve(1, 16)
        leader.feature_layers = (2,)
        leader.virtual = EmbeddedTokens(torch.randn(2, 256, generator=torch.Generator().manual_seed(0)))
        leader.prefill(0, [5, 6, 7])
        found = leader.forward([0], [[8, vocabulary, vocabulary + 1]], [[-1, 0, 1]])
        leader.commit(0, [0])
        leader.forward([0], [[9]], [[-1]])
    assert sent == [["reserve", "feature_layers", "virtual", "prefill"], ["forward"], ["commit", "forward"]]
    assert torch.equal(passes[0].logits, found.logits)
    assert torch.equal(passes[0].features, found.features)
    assert follower.virtual is leader.virtual
    assert not torch.allclose(found.logits[0, 1], found.logits[0, 2])
