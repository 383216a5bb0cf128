"""Acceptance of a head on recorded sequences: its drafter drafts along them, without the target if it can.

On greedy answers of the target this is the acceptance of greedy decoding, up to the bfloat16 of recorded features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.drafters.heads.base import HeadMemory
from hasten.accel.decoding.drafters.heads.fast_modules import use_fast_modules
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.replay import replay
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.targets.base import Target
from hasten.accel.training.data.records import Record
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, HeadBatch, TargetFacts
from hasten.accel.training.heads.stored import BFLOAT16, from_stored, to_stored
from hasten.accel.training.heads.vocabulary import DraftVocabulary

# Ranks that `rates` has for every depth.
RANKS = 10
_NO_RANK = 2**31


@dataclass(frozen=True)
class HeldOut:
    """Recorded sequences to measure on. prompts: tokens of each that come before the first draft."""

    records: Sequence[Record]
    prompts: Sequence[int]

    @classmethod
    def of(cls, records: Sequence[Record], least_prompt: int = 1) -> "HeldOut":
        """The part before the first token that is to be learned is the prompt, and `least_prompt` tokens at least."""
        prompts = []
        for record in records:
            answer = record.learned.nonzero()
            prompts.append(max(least_prompt, 1, int(answer[0]) if len(answer) else len(record)))
        kept = [index for index, prompt in enumerate(prompts) if prompt < len(records[index])]
        return cls([records[index] for index in kept], [prompts[index] for index in kept])

    @property
    def tokens(self) -> int:
        """Number of tokens that are drafted."""
        return sum(len(record) - prompt for record, prompt in zip(self.records, self.prompts, strict=True))


def deployed(
    head: DraftHead,
    weights: dict[str, Tensor],
    target: TargetFacts,
    vocabulary: DraftVocabulary,
    embedding: Tensor,
    trained: DraftNetwork,
    store: str = BFLOAT16,
) -> HeadMemory:
    """A drafter's memory with a copy of a network as it would be stored, on the embedding's device.

    trained: the network itself, whose target the copy takes over if it has one.
    """
    with torch.random.fork_rng(devices=[]):
        network = head.build(target, vocabulary)
    network.load_state_dict(from_stored(to_stored(weights, store)))
    network.attach(embedding)
    network.borrow(trained)
    network.to(embedding.device).eval().requires_grad_(False)
    # A draft model has ids of its own choice.
    return HeadMemory(network, head.layers(target), network.vocabulary.ids.tolist(), embedding.device)


@torch.no_grad()
def measured(head: DraftHead, drafter: Drafter, memory: HeadMemory, held_out: HeldOut, budget: int) -> DecodingStats:
    """Statistics of drafts of at most `budget` tokens along the sequences.

    A head's linear layers become fast; a draft model drafts as the target that it is. A head that drafts in passes of
    the target is measured by decoding, with trees sized by its rates on these sequences.
    """
    target = memory.network.target()
    if target is not None:
        memory.rates = rates_of(head, memory, held_out)
        return _decoded(target, drafter, memory, held_out, budget)
    own = head.drafter_memory(memory.network)
    if own is None:
        use_fast_modules(memory.network)
        own = memory
    sequences = [
        (record.tokens.tolist(), prompt) for record, prompt in zip(held_out.records, held_out.prompts, strict=True)
    ]
    features = (record.features.to(memory.device) for record in held_out.records)
    return DecodingStats.total(replay(drafter, own, sequences, budget, features))


def _decoded(target: Target, drafter: Drafter, memory: HeadMemory, held_out: HeldOut, budget: int) -> DecodingStats:
    """Statistics of decoding as many tokens after the prompts as the sequences have, greedily."""
    requests = [
        Request(str(number), record.tokens[:prompt].tolist(), len(record) - prompt)
        for number, (record, prompt) in enumerate(zip(held_out.records, held_out.prompts, strict=True))
    ]
    engine = Engine(target, drafter, memory=memory, policy=Fixed(budget))
    return DecodingStats.total(result.stats for result in engine.decode(requests))


@torch.no_grad()
def rates_of(head: DraftHead, memory: HeadMemory, held_out: HeldOut, ranks: int = RANKS) -> list[list[float]]:
    """Share of places where the text's token has each rank among the drafts, by depth.

    A depth counts the places whose tokens at all smaller depths are among the first `ranks` drafts, so that the product
    of a path's rates estimates how often the text goes along it.
    """
    network = memory.network
    hits = torch.zeros(network.max_depth, ranks, dtype=torch.float64)
    places = torch.zeros(network.max_depth, dtype=torch.float64)
    for record, prompt in zip(held_out.records, held_out.prompts, strict=True):
        batch = batch_of(record, prompt, memory)
        alive: Tensor | None = None
        for depth, logits in enumerate(head.teacher_forced(network, batch), 1):
            targets = batch.at_depth(depth)
            valid = targets.valid[0]
            rank = _ranks(logits[0], network.vocabulary.rows_of(targets.labels[0]))
            alive = valid if alive is None else alive[: len(valid)] & valid
            places[depth - 1] += int(alive.sum())
            hits[depth - 1] += torch.bincount(rank[alive & (rank < ranks)], minlength=ranks).cpu()
            alive = alive & (rank < ranks)
    return [[round(float(rate), 4) for rate in row] for row in hits / places.clamp(min=1)[:, None]]


def _ranks(logits: Tensor, rows: Tensor) -> Tensor:
    """Rank of each row's token (N,) among logits (N, R), from 0; large where the draft lacks the token."""
    own = logits.gather(-1, rows.clamp(min=0)[:, None])
    return ((logits > own).sum(-1)).masked_fill(rows < 0, _NO_RANK)


def batch_of(record: Record, prompt: int, memory: HeadMemory) -> HeadBatch:
    """A window of one record, of which tokens behind the prompt are to be learned."""
    learned = torch.arange(len(record)) >= prompt
    return HeadBatch(
        record.tokens[None],
        record.features[None].to(memory.network.dtype),
        record.top_ids[None].long(),
        record.top_log_probs[None].float(),
        learned[None],
        torch.zeros(1, len(record), dtype=torch.long),
        torch.arange(len(record))[None],
    ).to(memory.device)
