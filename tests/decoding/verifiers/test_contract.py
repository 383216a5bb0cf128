"""What every verifier in conf/verifier must do."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from tests.decoding.verifiers.drafts import DRAFT, KINDS, TARGET, expected_pairs, p_value, pairs, rows

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "verifier").glob("*.yaml"))
VERIFIERS = {path.stem: instantiate(OmegaConf.load(path)) for path in CONFIGS}
SAMPLED = Sampling(temperature=1.0)


def refusal(verifier, kind, greedy=False):
    return verifier.refusal(kind.draft_sampling, kind.chains, greedy)


ACCEPTED = [
    (verifier, kind)
    for verifier, each in VERIFIERS.items()
    for kind in KINDS
    if each.lossless and refusal(each, KINDS[kind]) is None
]
REFUSED = [(verifier, kind) for verifier, each in VERIFIERS.items() for kind in KINDS if refusal(each, KINDS[kind])]


@pytest.mark.parametrize(("verifier", "kind"), ACCEPTED)
def test_two_tokens_follow_the_target(verifier, kind):
    found = pairs(VERIFIERS[verifier], KINDS[kind].trees(4000), SAMPLED)
    assert p_value(found, expected_pairs(SAMPLED)) > 1e-3
    assert p_value(found.sum(1), expected_pairs(SAMPLED).sum(1)) > 1e-3


@pytest.mark.parametrize("verifier", [name for name, each in VERIFIERS.items() if each.lossless])
def test_what_is_followed_is_the_distribution_that_was_asked_for(verifier):
    sampling = Sampling(temperature=0.7, top_k=3)
    found = pairs(VERIFIERS[verifier], KINDS["drawn chain"].trees(2000), sampling)
    assert p_value(found, expected_pairs(sampling)) > 1e-3


@pytest.mark.parametrize(("verifier", "kind"), REFUSED)
def test_a_refusal_names_a_verifier_that_takes_the_draft_without_bias(verifier, kind):
    text = refusal(VERIFIERS[verifier], KINDS[kind])
    start, _, better = text.rpartition("use verifier=")
    assert start.startswith(f"verifier={verifier} takes ")
    assert (better, kind) in ACCEPTED
    assert "\n" not in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_at_temperature_0_the_path_is_the_greedy_one(verifier, kind):
    assert refusal(VERIFIERS[verifier], KINDS[kind], greedy=True) is None
    best = TARGET.argmax(-1).tolist()
    for tree in KINDS[kind].trees(50):
        state = torch.Generator().manual_seed(0)
        verdict = VERIFIERS[verifier].verify(tree, rows(tree, Sampling()), state)
        made, wanted = [*(tree.tokens[node] for node in verdict.path), verdict.token], [best[0]]
        while len(wanted) < len(made):
            wanted.append(best[wanted[-1] + 1])
        assert made == wanted
        # As far as the tree has it.
        last = verdict.path[-1] if verdict.path else -1
        assert best[wanted[-2] + 1 if verdict.path else 0] not in [
            tree.tokens[child] for child in tree.children.get(last, ())
        ]


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_without_a_draft_the_token_is_the_targets_own(verifier):
    found = pairs(VERIFIERS[verifier], (DraftTree() for _ in range(2000)), SAMPLED)
    assert p_value(found.sum(1), expected_pairs(SAMPLED).sum(1)) > 1e-3


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_same_seed_gives_the_same_tokens(verifier):
    one, other = (pairs(VERIFIERS[verifier], KINDS["drawn chain"].trees(100), SAMPLED) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("verifier", "kind"),
    [(name, kind) for name, kind in REFUSED if KINDS[kind].draft_sampling is not DraftSampling.DETERMINISTIC],
)
def test_what_is_refused_would_be_biased(verifier, kind):
    if verifier == "speculative_sampling":
        with pytest.raises(ValueError, match="too many values to unpack"):
            pairs(VERIFIERS[verifier], KINDS[kind].trees(10), SAMPLED)
    else:
        found = pairs(VERIFIERS[verifier], KINDS[kind].trees(3000), SAMPLED)
        assert p_value(found, expected_pairs(SAMPLED)) < 1e-6


def test_children_that_were_chosen_and_not_drawn_are_seen_to_bias_recursive_rejection():
    def presented(tree):
        probs = {parent: DRAFT[0 if parent < 0 else tree.tokens[parent] + 1] for parent in tree.children}
        return DraftTree(tree.tokens, tree.parents, DraftSampling.WITHOUT_REPLACEMENT, probs)

    found = pairs(RecursiveRejection(), map(presented, KINDS["tree"].trees(4000)), SAMPLED)
    assert p_value(found, expected_pairs(SAMPLED)) < 1e-6
