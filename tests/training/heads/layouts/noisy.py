"""Networks with random weights for the tests of layouts."""

import torch

from hasten.accel.training.heads.vocabulary import DraftVocabulary


def noisy(head, facts, ids=None, seed=0):
    """A network with random weights that bfloat16 holds exactly. ids: the lowest ids that it drafts, None is all."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = DraftVocabulary(torch.arange(ids or facts.vocabulary), facts.vocabulary)
    network = head.build(facts, vocabulary)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    return network.eval()
