"""Acceptance lengths: drafters that learn, sampled drafters with their verifiers, a drafter shared by two workers."""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.jobs.bench.decode import Config
from hasten.jobs.bench.decoding.setup import Setup, mean_acceptance_length, total
from hasten.jobs.bench.measurements import methods
from hasten.jobs.bench.processes.runs import hasten_job
from hasten.jobs.common.markdown import table

_LOG = logging.getLogger(__name__)
_LEARNING = ("token_recycling", "aded", "stand")
_LEARNING_NODES = 16
# Stochastic drafters at temperature 1, each with the verifier that it was published with, and its hyper-parameters.
_SAMPLED_NODES = 8
_SAMPLED: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("draft_model", "speculative_sampling", {"length": 8}),
    ("spectr", "recursive_rejection", {"paths": 2, "length": 4}),
    ("spectr", "k_sequential", {"paths": 2, "length": 4}),
    ("rsd_constant", "recursive_rejection", {"branching": (2, 1, 1, 1)}),
    ("rsd_beam", "recursive_rejection", {"width": 2, "length": 4}),
    ("dyspec", "recursive_rejection", {}),
)
_SHARED_NODES = 16


def learning(setup: Setup, prompts: Sequence[list[int]]) -> dict[str, list[float]]:
    """Mean acceptance length in each quarter of the prompts, for drafters that learn; their memory starts empty."""
    lengths = {}
    for name in _LEARNING:
        _LOG.info("learning: %s", name)
        engine = setup.engine(setup.drafter(name), policy=Fixed(_LEARNING_NODES))
        results = [next(iter(engine.decode([request]))) for request in setup.requests(prompts)]
        cuts = [len(results) * quarter // 4 for quarter in range(5)]
        lengths[name] = [
            mean_acceptance_length(total(results[first:last]))
            for first, last in itertools.pairwise(cuts)
            if last > first
        ]
    return lengths


def learning_table(lengths: Mapping[str, list[float]]) -> str:
    """Table of `learning`."""
    width = max(map(len, lengths.values()))
    rows = [
        [name, *(f"{length:.2f}" for length in quarters), f"{quarters[-1] / quarters[0] - 1:+.0%}"]
        for name, quarters in lengths.items()
    ]
    head = ["", *(f"quarter {number}" for number in range(1, width + 1)), "last to first"]
    title = f"Mean acceptance length as a drafter sees more text, {_LEARNING_NODES} nodes, memory empty at first"
    return f"{title}:\n\n" + table(head, rows)


def sampled(setup: Setup, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
    """Mean acceptance length and drafted nodes per pass at temperature 1, all with the same budget of nodes."""
    lengths = {}
    for drafter, verifier, options in _SAMPLED:
        _LOG.info("sampled: %s, %s", drafter, verifier)
        engine = setup.engine(setup.drafter(drafter, **options), 1, Fixed(_SAMPLED_NODES), methods.verifier(verifier))
        stats = total(engine.decode(setup.requests(prompts, 1.0)))
        nodes = stats.num_draft_tokens / stats.num_spec_steps
        lengths[f"{drafter}, {verifier}"] = mean_acceptance_length(stats), nodes
    return lengths


def sampled_table(lengths: Mapping[str, tuple[float, float]]) -> str:
    """Table of `sampled`."""
    rows = [[name, f"{length:.3f}", f"{nodes:.1f}"] for name, (length, nodes) in lengths.items()]
    return (
        f"Mean acceptance length at temperature 1, at most {_SAMPLED_NODES} nodes of the same draft model:\n\n"
        + table(["drafter, verifier", "mean acceptance length", "nodes/pass"], rows)
    )


def shared(config: Config, folder: Path, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
    """Mean acceptance length and tokens per second of two workers, with an ADED drafter each and with a shared one."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts), encoding="utf-8")
    options = {
        "target": config.target,
        "drafter": "aded",
        "draft_tokens": _SHARED_NODES,
        "max_new_tokens": config.max_new_tokens,
        "workers": 2,
        "in_flight": 2,
        "threads": config.threads,
        "dtype": config.dtype,
        "device": config.device,
        "ignore_eos": "true",
        "overwrite": "true",
        "prompts": path,
    }
    measured = {}
    for placement in ("private", "shared"):
        _LOG.info("two workers, placement=%s", placement)
        report, _ = hasten_job("decode", folder / placement, {**options, "placement": placement})
        metrics = report["metrics"]
        measured[placement] = metrics["mean_acceptance_length"], metrics["tokens_per_second"]
    return measured


def shared_table(measured: Mapping[str, tuple[float, float]]) -> str:
    """Table of `shared`."""
    rows = [[name, f"{length:.3f}", f"{rate:.0f}"] for name, (length, rate) in measured.items()]
    return (
        f"ADED in two workers over the prompts of the first file, {_SHARED_NODES} nodes, memory empty at first:\n\n"
        + table(["placement", "mean acceptance length", "tokens/s"], rows)
    )
