"""The decoding loop for several sequences: draft trees, run the target over them in one pass, verify, commit."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from hasten.accel.cache.prompt.base import saved_positions
from hasten.accel.decoding.bounds import fit_to_memory, needed_bytes
from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome, top_tokens_of
from hasten.accel.decoding.lengths.base import LengthController
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.lengths.timing import clock
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.stop_strings import StopMatcher, StopStrings
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT, DraftTree, VirtualNodes
from hasten.accel.decoding.verifiers.auto import Auto
from hasten.accel.decoding.verifiers.base import TargetRows, Verifier, best_of_all
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token.

    seed: of all random numbers that are drawn for it. stop: ids that end it, in addition to the engine's. contexts:
    ascending indices where the contexts among the tokens begin, and where the last one ends, for caches that read them
    side by side; () for none.
    """

    id: str
    tokens: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """token_ids: the decoded ids, including a final stop token and those of a stop string. ended: `stop` or `length`.

    stop_string: the string that ended it, None if none did.
    """

    id: str
    token_ids: list[int]
    ended: str
    stats: DecodingStats
    stop_string: str | None = None


@dataclass
class _Running:
    request: Request
    context: Context
    stop: frozenset[int]
    matcher: StopMatcher | None
    stats: DecodingStats = field(default_factory=DecodingStats)

    @property
    def generated(self) -> int:
        """Number of decoded tokens."""
        return len(self.context.tokens) - self.context.prompt_length


class Engine:
    """Decodes requests with one target, one drafter with its memory, and one verifier.

    drafter: None decodes without drafts. policy: decides how many tokens are drafted. stop: ids that end a sequence.
    stop_strings: texts that end a sequence. in_flight: sequences decoded at once. memory_bytes: bound of the bytes of
    caches and logits; the trees and then in_flight are reduced to fit; None sets no bound. on_tokens: called with a
    request's id and its new ids after every pass, for streaming. draft_clock: clock that drafting is timed with; None
    takes the one of `timing.clock`, which does not count time spent by other processes.
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
        stop_strings: StopStrings | None = None,
        in_flight: int = 1,
        prefill_chunk: int = 512,
        memory_bytes: int | None = None,
        on_tokens: Callable[[str, list[int]], None] | None = None,
        draft_clock: Callable[[], float] | None = None,
    ) -> None:
        self.target, self.drafter, self.verifier = target, drafter, verifier or Auto()
        self.policy = policy or Fixed(0 if drafter is None else 8)
        self.memory = memory
        if drafter is not None and memory is None:
            self.memory = drafter.new_memory(models or Models(target.vocabulary, target=target))
        if drafter is not None:
            self.policy.count_virtual(partial(drafter.max_virtual_nodes, self.memory))
        self._stop, self._stop_strings = frozenset(stop), stop_strings
        self._in_flight, self._chunk, self._on_tokens = in_flight, prefill_chunk, on_tokens
        self._memory_bytes, self._max_nodes = memory_bytes, self.policy.max_nodes
        self._clock = draft_clock or clock(target)
        self._running: list[_Running] = []

    def refusal(self, sampling: Sampling) -> str | None:
        """Why this verifier cannot verify this drafter's drafts; None if it can."""
        if self.drafter is None:
            return None
        return self.verifier.refusal_of_any(self.drafter.kinds(sampling), sampling.is_greedy)

    def decode(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as sequences end, in no particular order; raises UserError for an invalid request before decoding."""
        waiting = deque(requests)
        for request in waiting:
            self._check(request)
        if not waiting:
            return
        # Here, because a target may serve several engines in turn.
        self.target.feature_layers = () if self.drafter is None else self.drafter.target_layers(self.memory)
        self.target.virtual = None if self.drafter is None else self.drafter.virtual_tokens(self.memory)
        longest = max(len(request.tokens) + request.max_new_tokens for request in waiting)
        slots = min(self._in_flight, len(waiting))
        bound = fit_to_memory(partial(self._needed, longest), slots, self.policy.max_nodes, self._memory_bytes, longest)
        slots, self._max_nodes = bound.in_flight, bound.max_nodes
        self.target.reserve(slots, longest + self._max_nodes + 1)
        if self.drafter is not None and self._max_nodes:
            self.drafter.reserve(self.memory, slots, longest, self._max_nodes)
        self._running = []
        while waiting or self._running:
            while waiting and len(self._running) < slots:
                self._begin(waiting.popleft())
            self._step()
            for index in reversed(range(len(self._running))):
                ended = self._finish_reason(self._running[index])
                if ended is not None:
                    yield self._end(index, ended)

    def _needed(self, longest: int, slots: int, nodes: int) -> int:
        """Bytes of the caches and logits of target and drafter."""
        needed = needed_bytes(self.target, slots, longest, nodes)
        if self.drafter is not None and nodes:
            needed += self.drafter.needed_bytes(self.memory, slots, longest, nodes)
        return needed

    def _check(self, request: Request) -> None:
        refusal = self.refusal(request.sampling)
        if refusal is not None:
            raise UserError(refusal)
        if not request.tokens:
            raise UserError(f"prompt {request.id} has no tokens")
        self.target.check_contexts(request.contexts)
        needed = len(request.tokens) + request.max_new_tokens - saved_positions(request.contexts)
        if needed > self.target.max_length:
            raise UserError(
                f"prompt {request.id} has {len(request.tokens)} tokens, and with max_new_tokens="
                f"{request.max_new_tokens} it is longer than the model's context of {self.target.max_length}: "
                "use a shorter prompt or a smaller max_new_tokens"
            )

    @torch.no_grad()
    def _begin(self, request: Request) -> None:
        context = Context.start(list(request.tokens), request.sampling, request.seed)
        matcher = self._stop_strings.start() if self._stop_strings else None
        running = _Running(request, context, self._stop.union(request.stop), matcher)
        slot = len(self._running)
        started = perf_counter()
        self.target.clear(slot)
        # Drawn drafts are wasted on a verifier that does not read their distributions.
        context.draws = self.verifier.reads_draft_probs
        self.policy.begin_sequence()
        if self.drafter is not None:
            self.drafter.begin(context, self.memory)
        self.target.begin_prompt(slot, request.tokens, request.max_new_tokens, request.contexts)
        self._prefill(slot, context, request.max_new_tokens)
        self.target.end_prompt(slot)
        running.stats.prefill_seconds = perf_counter() - started
        self._running.append(running)

    def _prefill(self, slot: int, context: Context, new: int) -> None:
        """Run the prompt, and let the drafter observe the end of it. The last token is the root of the first tree."""
        prompt = context.tokens[:-1]
        drafter = self.drafter
        observed = 0
        observes = self._max_nodes and self.policy.observes_prompt(self._in_flight) and not self.target.reads_prompts
        if drafter is not None and observes:
            # A short completion does not earn back the time of many tokens.
            observed = min(drafter.observes_prompt, len(prompt), new // 4)
        features = self.target.prefill(slot, prompt[: len(prompt) - observed], self._chunk)
        if drafter is not None and features is not None:
            drafter.observe_features(self.memory, context, 0, features)
        # No more logits at once than a pass of decoding has, which the bound on memory allows for.
        width = self._max_nodes + 1
        for start in range(len(prompt) - observed, len(prompt), width):
            part = prompt[start : start + width]
            rows = self.target.forward([slot], [part], [range(ROOT, len(part) - 1)])
            self.target.commit(slot, range(len(part)))
            if drafter is not None:
                drafter.observe_prompt(self.memory, context, start, *top_tokens_of(drafter, rows.logits[0]))
                if rows.features is not None:
                    drafter.observe_features(self.memory, context, start, rows.features[0])

    @torch.no_grad()
    def _step(self) -> None:
        """One pass of the target; every running sequence grows by at least one token."""
        running = self._running
        drafting = self._drafting()
        budget = min(self._max_nodes, self.policy.budget(len(running))) if drafting else 0
        # The first of them that is running has the fewest tokens that a drafter has not read.
        proposing = dict([next(iter(drafting.items()))]) if budget and self.policy.probes() else drafting
        self._prefill_drafter(proposing, budget)
        started, counted = perf_counter(), self._clock()
        trees = self._propose(proposing, budget)
        virtual = self._virtual_nodes(drafting, trees, budget)
        drafted, draft_seconds = perf_counter(), self._clock() - counted
        # Without the target's most probable tokens learning costs next to nothing.
        learns = self.drafter is not None and (not drafting or not self.drafter.observes or self.policy.learns())
        rows = self.target.forward(
            range(len(running)),
            [
                [
                    sequence.context.tokens[-1],
                    *tree.tokens,
                    *(self.target.vocabulary + number for number in nodes.numbers),
                ]
                for sequence, tree, nodes in zip(running, trees, virtual, strict=True)
            ],
            [
                [ROOT, *(parent + 1 for parent in tree.parents), *(parent + 1 for parent in nodes.parents)]
                for tree, nodes in zip(trees, virtual, strict=True)
            ],
        )
        if rows.logits.is_cuda:
            torch.cuda.synchronize(rows.logits.device)  # otherwise verification would be charged with the pass
        passed, counted = perf_counter(), self._clock()
        top_tokens, top_probs = self._top_tokens(rows.logits) if learns else (None, None)
        draft_seconds += self._clock() - counted
        shares = (drafted - started + perf_counter() - passed) / len(running), (passed - drafted) / len(running)
        begun = perf_counter()
        best = best_of_all(rows.logits, [sequence.context for sequence in running])
        best_seconds = (perf_counter() - begun) / len(running)
        for slot, (sequence, tree) in enumerate(zip(running, trees, strict=True)):
            begun = perf_counter()
            known = None if best is None else best[slot][: len(tree) + 1]
            logits = TargetRows(rows.logits[slot, : len(tree) + 1], tree, sequence.context, known)
            verdict = self.verifier.verify(tree, logits, sequence.context.generator)
            outcome = Outcome(sequence.context, tree, verdict.path, verdict.token)
            new = self._truncate(sequence, outcome.committed)
            if len(new) <= len(verdict.path):
                # The sequence ends inside the path: nodes behind its end are neither accepted nor learned from.
                outcome = replace(outcome, path=verdict.path[: len(new)], ended=True)
            path = [0, *(node + 1 for node in outcome.path)]
            self.target.commit(slot, path)
            verified = perf_counter()
            if self.drafter is not None and rows.features is not None:
                counted = self._clock()
                start = len(sequence.context.tokens) - 1
                self.drafter.observe_features(self.memory, sequence.context, start, rows.features[slot, path])
                draft_seconds += self._clock() - counted
            if self.drafter is not None and learns:
                counted = self._clock()
                tokens = None if top_tokens is None else top_tokens[slot, : len(tree) + 1]
                probs = None if top_probs is None else top_probs[slot, : len(tree) + 1]
                outcome = replace(outcome, top_tokens=tokens, top_probs=probs)
                self.drafter.observe(self.memory, outcome)
                draft_seconds += self._clock() - counted
            if slot in drafting:
                self.policy.observe(outcome)
            sequence.context.tokens += new
            if self.drafter is not None and len(virtual[slot]) and not outcome.ended:
                counted = self._clock()
                self._observe_virtual(sequence.context, virtual[slot], outcome, rows.logits[slot, len(tree) + 1 :])
                draft_seconds += self._clock() - counted
            sequence.stats.add(
                outcome,
                len(new),
                draft_seconds=shares[0] + perf_counter() - verified,
                target_seconds=shares[1],
                verify_seconds=best_seconds + verified - begun,
            )
            if self._on_tokens is not None:
                self._on_tokens(sequence.request.id, new)
        if drafting:
            self.policy.record_drafting(sum(map(len, trees)), draft_seconds)

    def _top_tokens(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the drafter observes of logits (B, N, V), see `Outcome`; of all sequences at once, which is cheaper."""
        if self.drafter is None or not self.drafter.observes:
            return None, None
        tokens, probs = top_tokens_of(self.drafter, logits.flatten(0, 1))
        return tokens.unflatten(0, logits.shape[:2]), None if probs is None else probs.unflatten(0, logits.shape[:2])

    def _drafting(self) -> dict[int, int]:
        """Slots of the sequences that can accept a draft token, each with the largest depth of one.

        The pass itself gives one more token, so a sequence that lacks only one is not drafted for.
        """
        if self.drafter is None:
            return {}
        depths = {
            slot: sequence.request.max_new_tokens - sequence.generated - 1
            for slot, sequence in enumerate(self._running)
        }
        for slot in depths:
            room = self.target.room(slot)
            if room is not None:
                depths[slot] = min(depths[slot], room - 1)
        return {slot: depth for slot, depth in depths.items() if depth > 0}

    def _prefill_drafter(self, drafting: Iterable[int], budget: int) -> None:
        """Let the drafter process prompts, whose time counts as that of prefill."""
        if self.drafter is None or budget == 0:
            return
        contexts = [self._running[slot].context for slot in drafting]
        started = perf_counter()
        self.drafter.prefill(contexts, self.memory, budget)
        seconds = (perf_counter() - started) / len(contexts)
        for slot in drafting:
            self._running[slot].stats.prefill_seconds += seconds

    def _propose(self, drafting: Mapping[int, int], budget: int) -> list[DraftTree]:
        """The trees to verify, one for each running sequence; drafting: slots, and the largest depth of a draft."""
        running = self._running
        drafts = [DraftTree()] * len(running)
        if self.drafter is None or budget == 0:
            return drafts
        if self.drafter.chains() and max(drafting.values()) < budget:
            budget = max(drafting.values())
            self.policy.limit(budget)
        trees = self.drafter.propose_all([running[slot].context for slot in drafting], self.memory, budget)
        whole = []
        for index, (max_depth, tree) in enumerate(zip(drafting.values(), trees, strict=True)):
            assert len(tree) <= budget, (self.drafter, len(tree), budget)
            whole.append(self.verifier.reads_draft_probs and tree.draft_probs is not None)
            if tree.depths and max(tree.depths) > max_depth:
                trees[index] = tree.keep([node for node, depth in enumerate(tree.depths) if depth <= max_depth])
        for slot, tree in zip(drafting, self.policy.select(trees, len(running), whole), strict=True):
            drafts[slot] = tree
        return drafts

    def _virtual_nodes(
        self, drafting: Mapping[int, int], trees: Sequence[DraftTree], budget: int
    ) -> list[VirtualNodes]:
        """The virtual nodes of the pass behind each draft."""
        virtual = [VirtualNodes(len(tree)) for tree in trees]
        if self.drafter is None or budget == 0 or self.target.virtual is None:
            return virtual
        for slot, max_depth in drafting.items():
            tree = trees[slot]
            nodes = self.drafter.virtual_nodes(self._running[slot].context, self.memory, tree, budget)
            assert len(tree) + len(nodes) <= budget, (self.drafter, len(tree), len(nodes), budget)
            virtual[slot] = nodes.within(tree, max_depth)
        return virtual

    def _observe_virtual(self, context: Context, nodes: VirtualNodes, outcome: Outcome, logits: Tensor) -> None:
        """Hand the drafter the logits (M, V) of those virtual nodes that hang on the last accepted node."""
        assert self.drafter is not None
        own = nodes.on(outcome.path[-1] if outcome.path else ROOT)
        self.drafter.observe_virtual(self.memory, context, [nodes.numbers[index] for index in own], logits[own])

    def _truncate(self, running: _Running, new: list[int]) -> list[int]:
        """The new tokens up to the first stop token or stop string, and within max_new_tokens."""
        new = new[: running.request.max_new_tokens - running.generated]
        new = new[: next((index for index, token in enumerate(new, 1) if token in running.stop), None)]
        return new if running.matcher is None else new[: running.matcher.add(new)]

    def _finish_reason(self, running: _Running) -> str | None:
        if running.generated and running.context.tokens[-1] in running.stop:
            return "stop"
        if running.matcher is not None and running.matcher.matched is not None:
            return "stop"
        return "length" if running.generated >= running.request.max_new_tokens else None

    def _end(self, index: int, ended: str) -> Result:
        running = self._running[index]
        if self.drafter is not None:
            self.drafter.end(running.context, self.memory)
        last = len(self._running) - 1
        if index != last:  # the slots in use stay adjacent
            self.target.swap(index, last)
            self._running[index] = self._running[last]
        self._running.pop()
        token_ids = running.context.tokens[running.context.prompt_length :]
        matched = None if running.matcher is None else running.matcher.matched
        return Result(running.request.id, token_ids, ended, running.stats, matched)
