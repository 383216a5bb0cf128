"""Evaluators of a search: the whole model in each of them, and candidates that are measured on a few tokens."""

from dataclasses import dataclass
from typing import Any

from accel.planning.estimate import Estimate, Process, Rates, Step, Work
from accel.planning.model import Model, with_kept_back

# Candidates that share their first blocks run these once: about so much of a model is left to run for each.
_NOT_SHARED = 0.6
_LOGIT_NUMBERS = 6
_LOGITS_BYTES = 16 << 20
_FIXED_CACHE = 2**30


@dataclass(frozen=True)
class Search:
    """A search as plain values. sequences, length: of the search's tokens; error_sequences: those of `errors`.

    units: what levels are chosen for. measured: candidates whose errors are measured. allocators: those that measure
    candidates, once for each of `budgets`. original_bytes: kept for a token of the original's predictions.
    """

    model: Model
    sequences: int
    length: int
    error_sequences: int
    measured: int
    allocators: tuple[Any, ...]
    budgets: int
    original_bytes: int
    batch: int = 1
    workers: int = 2
    threads: int = 1
    gpus: int = 0


def estimate(search: Search, rates: Rates) -> Estimate:
    """What the evaluators take; levels, and the checkpoint that comes out, are apart."""
    model = search.model
    weights = sum(model.block_bytes(index) for index in range(model.blocks))
    swapped = min(_FIXED_CACHE, 4 * weights)
    known = search.sequences * search.length
    held = {
        "weights of all blocks": weights,
        "head": model.head_bytes(),
        "weights swapped out": swapped,
        "original's predictions": known * search.original_bytes,
        "hidden states": model.hidden_bytes(search.batch, search.length) * (model.blocks + 1),
        "activations": model.activation_bytes(search.batch, search.length),
        "logits": 2 * _LOGITS_BYTES,
    }
    if search.gpus:
        host = {"search": {"process": rates.worker_bytes}}
        device = {"search": {"context": rates.device_bytes, **held}}
    else:
        parts = {"process": rates.worker_bytes, **held}
        host, device = {"search": with_kept_back(parts, held["activations"] + held["logits"])}, {}
    process = Process("evaluator", search.workers, search.threads, host, search.gpus, device)
    tokens = float(known) + search.measured * search.error_sequences * search.length * _NOT_SHARED
    for allocator in search.allocators:
        tokens += search.budgets * _tokens(allocator) * _NOT_SHARED
    work = Work()
    for index in range(model.blocks):
        work += model.run(index, search.length, search.length, search.batch)
    work += model.logits(search.length) + Work(elements=_LOGIT_NUMBERS * search.length * model.vocabulary)
    seconds = work.seconds(rates) * tokens / search.length
    load = Work()
    for index in range(model.blocks):
        load += model.load(index)
    begin = load.seconds(rates)
    step = Step("search", begin + seconds / search.workers, search.workers * begin + seconds)
    return Estimate((process,), (step,), {"search's tokens": search.workers * known * 8})


def _tokens(allocator: Any) -> float:
    """Tokens that a search of candidates measures; 0 of an allocator that measures none."""
    if not allocator.needs_evaluation:
        return 0.0
    generations, steps = allocator.generations, list(allocator.tokens)
    candidates = [allocator.offspring, *allocator.survivors[:-1]]
    new = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    one = sum(count * tokens for count, tokens in zip(candidates, new, strict=True)) + steps[-1]
    return float(generations * one + allocator.initial_candidates * allocator.initial_tokens)
