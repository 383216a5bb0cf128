"""Untrained heads on the embedded target, one for each draft head in conf/head."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.decoding.drafters.heads.base import HeadDrafter
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import DraftHead, TargetFacts, TargetWeights
from hasten.accel.training.heads.vocabulary import DraftVocabulary

CONF = Path(__file__).parents[4] / "conf"
DRAFT_IDS = 1024


def without_target_heads():
    """Configs of drafters that read nothing of the target."""
    paths = sorted((CONF / "drafter").glob("*.yaml"))
    return [path for path in paths if not instantiate(OmegaConf.load(path), _convert_="all").reads_target]


def with_target_heads():
    """Configs of drafters with a head on the target; not of those that combine one with others."""
    paths = sorted((CONF / "drafter").glob("*.yaml"))
    return [path for path in paths if isinstance(instantiate(OmegaConf.load(path), _convert_="all"), HeadDrafter)]


def all_heads():
    """Heads by name, with their default hyper-parameters."""
    made = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted((CONF / "head").glob("*.yaml"))}
    return {name: head for name, head in made.items() if isinstance(head, DraftHead)}


def draft_heads():
    """Heads that draft from the target's hidden states by name."""
    return {name: head for name, head in all_heads().items() if head.reads_target}


def vocabulary(facts):
    """The lower ids, among which are the most frequent ones of a byte-pair encoding."""
    return DraftVocabulary.most_frequent(torch.arange(facts.vocabulary, 0, -1), DRAFT_IDS)


def network_of(head, seed=0):
    """An untrained network with a little noise on every weight, so that none of its parts is the identity."""
    folder = resolve("embedded:target")
    facts = TargetFacts.of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = head.build(facts, vocabulary(facts))
        weights = TargetWeights.of(folder)
        head.initialise(network, weights)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    network.attach(weights.embedding)
    return network


def save_untrained(head, folder):
    """Write an untrained head; returns its folder."""
    facts = TargetFacts.of(resolve("embedded:target"))
    rates = [[0.5, 0.2, 0.1, 0.05]] * 8
    head.save(network_of(head), folder, facts, {"rates": rates})
    return folder
