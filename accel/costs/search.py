"""Cost of a search: evaluators that each hold the whole model and measure candidates on samples of tokens."""

import math
from dataclasses import dataclass

from hasten.accel.compression.search.base import AllocationMethod, Searcher
from hasten.accel.compression.search.sensitivity import STATES_BYTES, kept_tokens
from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model, with_retained
from hasten.accel.models.output_layer import TILE_TOKENS

# Candidates that share their first blocks run these once: share of the blocks that each candidate runs on average.
_NOT_SHARED = 0.6
# Several evaluators wait for each other at the end of every selection step: share of the time in which they work, and
# slowdown of each, because they share the memory bandwidth and the clock of the machine.
_BUSY, _TOGETHER = 0.9, 1.16
# Elementwise operations on a logit, in the cache.
_LOGIT_NUMBERS = 3
_FIXED_CACHE = 2**30
# Sensitivities run a block for the original and for the candidate, again for the backward pass, and backwards, which
# takes as long as two runs; and the head of both models, and its gradient.
_BACKWARD_BLOCKS, _BACKWARD_HEADS = 5, 3


@dataclass(frozen=True)
class Search:
    """A search as plain values. sequences, length: of the search's tokens; error_sequences: those of `errors`.

    levels: maximum number of a layer's levels. measured: number of choices whose errors are measured. error_passes:
    measurements of sensitivities for each budget, 0 where errors are not measured so. allocators: each
    runs once for each of `budgets`; searchers among them measure candidates. original_bytes: stored for a token of the
    original's predictions.
    """

    model: Model
    sequences: int
    length: int
    error_sequences: int
    levels: int
    measured: int
    allocators: tuple[AllocationMethod, ...]
    budgets: int
    original_bytes: int
    batch: int = 1
    workers: int = 2
    threads: int = 1
    gpus: int = 0
    error_passes: int = 0


def estimate(search: Search, rates: Rates) -> Estimate:
    """Estimate of the evaluators, without the levels and without writing the resulting checkpoint."""
    model = search.model
    weights = sum(model.block_bytes(index) for index in range(model.blocks))
    searchers = [allocator for allocator in search.allocators if isinstance(allocator, Searcher)]
    swapped = min(_FIXED_CACHE, (search.levels if searchers else 1) * weights)
    # Samples are drawn from all sequences, and soon every sequence was in one.
    used = search.sequences if searchers else min(search.sequences, search.error_sequences if search.measured else 0)
    known = used * search.length
    # Hidden states of a process's share of the sequences, at every block.
    states = 0
    if search.error_passes:
        of_sequence = model.hidden_bytes(1, search.length) * (model.blocks + 2)
        share = math.ceil(search.error_sequences / search.workers)
        # At least a batch, however large it is.
        states = max(search.batch * of_sequence, min(share * of_sequence, STATES_BYTES))
    if searchers or search.measured or not search.error_passes:
        # The pass over the blocks comes before the whole model is loaded.
        held = {
            "weights of all blocks": weights,
            "head": model.head_bytes(),
            "weights swapped out": swapped,
            "original's predictions": known * search.original_bytes,
            "hidden states": max(states, model.hidden_bytes(search.batch, search.length) * (model.blocks + 1)),
        }
    else:
        held = {
            "a block, compressed and not": 3 * max(model.block_bytes(index) for index in range(model.blocks)),
            "head": model.head_bytes(),
            "hidden states": states,
        }
    held |= {
        "activations": model.activation_bytes(search.batch, search.length),
        "logits": _logits_bytes(search),
    }
    if search.gpus:
        host = {"search": {"process": rates.worker_bytes}}
        device = {"search": {"context": rates.device_bytes, **held}}
    else:
        parts = {"process": rates.worker_bytes, **held}
        host, device = {"search": with_retained(parts, held["activations"] + held["logits"])}, {}
    process = Process("evaluator", search.workers, search.threads, host, search.gpus, device)
    tokens = float(search.measured * search.error_sequences * search.length)
    tokens += search.budgets * sum(searcher.measured_tokens(search.sequences * search.length) for searcher in searchers)
    blocks = Work()
    for index in range(model.blocks):
        blocks += model.run(index, search.length, search.length, search.batch)
    head = model.logits(search.length) + Work(elements=_LOGIT_NUMBERS * search.length * model.vocabulary)
    # Each evaluator runs the original on the sequences of its samples.
    own = search.workers * known
    seconds = blocks.seconds(rates) * (own + tokens * _NOT_SHARED) + head.seconds(rates) * (own + tokens)
    backward = float(search.budgets * search.error_passes * search.error_sequences * search.length)
    seconds += backward * (_BACKWARD_BLOCKS * blocks.seconds(rates) + _BACKWARD_HEADS * head.seconds(rates))
    seconds *= (_TOGETHER if search.workers > 1 else 1.0) / search.length
    load = Work()
    for index in range(model.blocks):
        load += model.load(index)
    begin = load.seconds(rates)
    at_once = search.workers * (_BUSY if search.workers > 1 else 1.0)
    step = Step("search", begin + seconds / at_once, search.workers * begin + seconds)
    sent = search.workers * search.sequences * search.length * 8
    return Estimate((process,), (step,), {"search's tokens": sent})


def _logits_bytes(search: Search) -> int:
    """Bytes of a tile of logits, and of the logits of both models that a measurement of sensitivities keeps.

    Where a fitness stores the original's predictions of the whole vocabulary, they are logits before.
    """
    model, tokens = search.model, min(TILE_TOKENS, search.length)
    whole = 4 * model.vocabulary
    stored = tokens * whole if search.original_bytes >= whole else 0
    kept = 2 * whole * kept_tokens(model.vocabulary) if search.error_passes else 0
    return model.tile_bytes(2, gpu=search.gpus > 0) + max(stored, kept)
