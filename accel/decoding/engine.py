"""The decoding loop: propose, one pass of the target over the tree, verify, commit; for several sequences at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from hasten.accel.decoding.bounds import bounded
from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome
from hasten.accel.decoding.lengths.base import LengthController
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.lengths.timing import clock
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verifier
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token. sampling: what the user asked for. seed: of all that is drawn for it."""

    id: str
    tokens: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """token_ids: what was decoded, a stop token that ended it among them. ended: `stop` or `length`."""

    id: str
    token_ids: list[int]
    ended: str
    stats: DecodingStats


@dataclass
class _Running:
    request: Request
    context: Context
    stats: DecodingStats = field(default_factory=DecodingStats)

    @property
    def made(self) -> int:
        return len(self.context.tokens) - self.context.prompt_length


class Engine:
    """One target, one drafter with its memory, one verifier.

    drafter: None decodes plainly. stop: ids that end a sequence. in_flight: sequences at once. policy: how many tokens
    to draft. on_tokens: called with a request's id and the ids it has just grown by, for streaming. memory_bytes: what
    caches and logits may take, None is no bound; trees and then the sequences in flight are cut to it. draft_clock: the
    seconds that drafting is timed by; None is the policy's clock, which leaves out what other processes compute.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        verifier: Verifier | None = None,
        *,
        models: Models | None = None,
        memory: Memory = None,
        policy: LengthController | None = None,
        stop: Iterable[int] = (),
        in_flight: int = 1,
        prefill_chunk: int = 512,
        memory_bytes: int | None = None,
        on_tokens: Callable[[str, list[int]], None] | None = None,
        draft_clock: Callable[[], float] | None = None,
    ) -> None:
        self.target, self.drafter, self.verifier = target, drafter, verifier or SampleAndMatch()
        self.policy = policy or Fixed(0 if drafter is None else 8)
        self.memory = memory
        if drafter is not None and memory is None:
            self.memory = drafter.new_memory(models or Models(target.vocabulary))
        self._stop = frozenset(stop)
        self._in_flight, self._chunk, self._on_tokens = in_flight, prefill_chunk, on_tokens
        self._memory_bytes, self._max_nodes = memory_bytes, self.policy.max_nodes
        self._clock = draft_clock or clock(target)
        self._running: list[_Running] = []

    def refusal(self, sampling: Sampling) -> str | None:
        """Why this drafter and this verifier do not go together; None where they do."""
        if self.drafter is None:
            return None
        return self.verifier.refusal(self.drafter.draft_sampling(sampling), self.drafter.chains(), sampling.is_greedy)

    def decode(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they end, in no particular order; raises UserError before the first where something is wrong."""
        waiting = deque(requests)
        for request in waiting:
            self._check(request)
        if not waiting:
            return
        longest = max(len(request.tokens) + request.max_new_tokens for request in waiting)
        slots = min(self._in_flight, len(waiting))
        bound = bounded(self.target, slots, longest, self.policy.max_nodes, self._memory_bytes)
        slots, self._max_nodes = bound.in_flight, bound.max_nodes
        self.target.reserve(slots, longest + self._max_nodes + 1)
        self._running = []
        while waiting or self._running:
            while waiting and len(self._running) < slots:
                self._begin(waiting.popleft())
            self._step()
            for index in reversed(range(len(self._running))):
                ended = self._ended(self._running[index])
                if ended is not None:
                    yield self._end(index, ended)

    def _check(self, request: Request) -> None:
        refusal = self.refusal(request.sampling)
        if refusal is not None:
            raise UserError(refusal)
        if not request.tokens:
            raise UserError(f"prompt {request.id} has no tokens")
        needed = len(request.tokens) + request.max_new_tokens
        if needed > self.target.max_length:
            raise UserError(
                f"prompt {request.id} has {len(request.tokens)} tokens, and with max_new_tokens="
                f"{request.max_new_tokens} it is longer than the model's context of {self.target.max_length}"
            )

    @torch.no_grad()
    def _begin(self, request: Request) -> None:
        context = Context.start(list(request.tokens), request.sampling, request.seed)
        running = _Running(request, context)
        slot = len(self._running)
        started = perf_counter()
        self.target.clear(slot)
        # The last token is the root of the first tree.
        self.target.prefill(slot, context.tokens[:-1], self._chunk)
        running.stats.prefill_seconds = perf_counter() - started
        if self.drafter is not None:
            begun = perf_counter()
            self.drafter.begin(context, self.memory)
            running.stats.draft_seconds = perf_counter() - begun
        self._running.append(running)

    @torch.no_grad()
    def _step(self) -> None:
        """One token at least for every running sequence."""
        running = self._running
        started, counted = perf_counter(), self._clock()
        trees = self._drafts()
        drafted, draft_seconds = perf_counter(), self._clock() - counted
        rows = self.target.forward(
            range(len(running)),
            [[sequence.context.tokens[-1], *tree.tokens] for sequence, tree in zip(running, trees, strict=True)],
            [[ROOT, *(parent + 1 for parent in tree.parents)] for tree in trees],
        )
        if rows.logits.is_cuda:
            torch.cuda.synchronize(rows.logits.device)  # else the pass would be counted where its result is read
        passed = perf_counter()
        shares = (drafted - started) / len(running), (passed - drafted) / len(running)
        self.policy.record_drafting(sum(map(len, trees)), draft_seconds)
        for slot, (sequence, tree) in enumerate(zip(running, trees, strict=True)):
            begun = perf_counter()
            verdict = self.verifier.verify(
                tree, TargetRows(rows.logits[slot, : len(tree) + 1], tree, sequence.context), sequence.context.generator
            )
            self.target.commit(slot, [0, *(node + 1 for node in verdict.path)])
            verified = perf_counter()
            outcome = Outcome(sequence.context, tree, verdict.path, verdict.token)
            if self.drafter is not None:
                outcome = outcome.shown_to(self.drafter, rows.logits[slot, : len(tree) + 1])
                self.drafter.observe(self.memory, outcome)
                self.policy.observe(outcome)
            new = self._cut(sequence, outcome.committed)
            sequence.context.tokens += new
            sequence.stats.add(
                outcome,
                len(new),
                draft_seconds=shares[0] + perf_counter() - verified,
                target_seconds=shares[1],
                verify_seconds=verified - begun,
            )
            if self._on_tokens is not None:
                self._on_tokens(sequence.request.id, new)

    def _drafts(self) -> list[DraftTree]:
        running = self._running
        if self.drafter is None:
            return [DraftTree()] * len(running)
        budget = min(self._max_nodes, self.policy.budget(len(running)))
        if budget == 0:
            return [DraftTree()] * len(running)
        trees = self.drafter.propose_all([sequence.context for sequence in running], self.memory, budget)
        drafts = []
        for sequence, tree in zip(running, trees, strict=True):
            assert len(tree) <= budget, (self.drafter, len(tree), budget)
            # Nothing may be drafted behind the last token that is wanted.
            left = sequence.request.max_new_tokens - sequence.made - 1
            whole = self.verifier.reads_draft_probs and tree.draft_probs is not None
            tree = self.policy.select(tree, len(running), whole)
            if tree.depths and max(tree.depths) > left:
                tree = tree.keep([node for node, depth in enumerate(tree.depths) if depth <= left])
            drafts.append(tree)
        return drafts

    def _cut(self, running: _Running, new: list[int]) -> list[int]:
        """What of the new tokens is wanted: up to a stop token and the length asked for."""
        new = new[: running.request.max_new_tokens - running.made]
        for index, token in enumerate(new):
            if token in self._stop:
                return new[: index + 1]
        return new

    def _ended(self, running: _Running) -> str | None:
        if running.made and running.context.tokens[-1] in self._stop:
            return "stop"
        return "length" if running.made >= running.request.max_new_tokens else None

    def _end(self, index: int, ended: str) -> Result:
        running = self._running[index]
        if self.drafter is not None:
            self.drafter.end(running.context, self.memory)
        last = len(self._running) - 1
        if index != last:  # the slots in use stay neighbours
            self.target.swap(index, last)
            self._running[index] = self._running[last]
        self._running.pop()
        token_ids = running.context.tokens[running.context.prompt_length :]
        return Result(running.request.id, token_ids, ended, running.stats)
