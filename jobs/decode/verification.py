"""The verifier that the options of `hasten decode` choose, and what to say about it."""

from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftKind, DraftSampling
from hasten.accel.decoding.verifiers.auto import Auto, rules_for
from hasten.accel.decoding.verifiers.base import Verifier
from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import build
from hasten.jobs.common.records import Record
from hasten.jobs.decode.options import DecodeConfig


def chosen_verifier(config: DecodeConfig, drafter: Drafter | None, sampling: Sampling) -> Verifier:
    """The verifier; in place of `auto` the rule for the drafter's drafts, if all of them are of one kind.

    UserError if it cannot verify the drafter's drafts.
    """
    verifier: Verifier = build(config.verifier)
    kinds = _kinds(config, drafter, sampling)
    refusal = verifier.refusal_of_any(kinds, sampling.is_greedy)
    if refusal is not None:
        raise UserError(refusal)
    rules = rules_for(kinds)
    return rules[0] if isinstance(verifier, Auto) and len(rules) == 1 else verifier


def verifier_settings(config: DecodeConfig, verifier: Verifier) -> Record:
    """The chosen verifier as a composed group."""
    target = f"{type(verifier).__module__}.{type(verifier).__qualname__}"
    return config.verifier if config.verifier["_target_"] == target else {"_target_": target}


def rule_names(config: DecodeConfig, verifier: Verifier, drafter: Drafter | None, sampling: Sampling) -> list[str]:
    """Names of the rules that verify: of a verifier that is not `auto`, its own."""
    rules = rules_for(_kinds(config, drafter, sampling)) if isinstance(verifier, Auto) else [verifier]
    return sorted(_name(rule) for rule in rules)


def explained(config: DecodeConfig, verifier: Verifier, drafter: Drafter | None, sampling: Sampling) -> str | None:
    """A line for the log about how drafts are verified; None where there is nothing to choose."""
    if drafter is None or sampling.is_greedy:
        return None
    if config.verifier["_target_"].endswith(".Auto"):
        names = rule_names(config, verifier, drafter, sampling)
        return f"verifier=auto: {' or '.join(names)}, by how {type(drafter).__name__} chooses its tokens"
    if not verifier.reads_draft_probs and any(
        kind.draft_sampling is not DraftSampling.DETERMINISTIC for kind in drafter.kinds(sampling)
    ):
        return (
            f"verifier={_name(verifier)} reads no draft distributions: {type(drafter).__name__} proposes its most "
            "probable tokens; verifier=auto accepts more"
        )
    return None


def loss_notice(verifier: Verifier, drafter: Drafter | None, sampling: Sampling) -> str | None:
    """What to say where the output is not the target's own; None where it is."""
    if drafter is None or verifier.is_lossless(sampling.is_greedy):
        return None
    return f"the output is not the target's own: verifier={_name(verifier)} is not lossless"


def _kinds(config: DecodeConfig, drafter: Drafter | None, sampling: Sampling) -> frozenset[DraftKind]:
    if drafter is None:
        return frozenset({DraftKind(DraftSampling.DETERMINISTIC, True)})
    # At temperature 0 nothing is drawn, and a shared drafter draws nothing at any temperature.
    draws = not sampling.is_greedy and not (
        config.placement == "shared" and config.verifier["_target_"].endswith(".Auto")
    )
    return frozenset(
        kind if draws else kind._replace(draft_sampling=DraftSampling.DETERMINISTIC) for kind in drafter.kinds(sampling)
    )


def _name(verifier: Verifier) -> str:
    """The verifier's name in conf/verifier."""
    return type(verifier).__module__.rpartition(".")[2]
