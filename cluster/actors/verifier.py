"""The verifier actor: a target in one process, with a private drafter or a connection to a shared one."""

import queue
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.engine import Engine, Request, Result
from hasten.accel.decoding.lengths.acceptance import expected_rate
from hasten.accel.decoding.lengths.base import DraftLength, LengthController
from hasten.accel.decoding.lengths.timing import PassCosts, measure_costs
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stop_strings import StopStrings
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.ties import Ties, check_ties
from hasten.accel.decoding.tree import DraftSampling
from hasten.accel.decoding.verifiers.base import Verifier
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.actors.drafter import Address
from hasten.cluster.actors.remote_drafter import Connection, RemoteDrafter
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

_TRIPS = 5

OnTokens = Callable[[str, list[int]], None]


@dataclass(frozen=True)
class DecodeSpec:
    """Arguments of verifiers and drafters, as picklable values.

    target, draft: checkpoint folders; draft is None if the drafter needs no draft model. vocabulary: size of the
    target's. drafter: None decodes without drafts. path: see hasten.accel.decoding.targets.loading. stop: ids that end
    a sequence. stop_strings: texts that end one, in the text of the target's tokenizer. draft_length: how many tokens
    are drafted for a pass; max_draft_tokens bounds adaptive lengths. memory_bytes: bound of caches and logits. dtype,
    other_dtypes: of the arithmetic; the fastest of them is chosen. compiled: whether the fast path is compiled.
    learned: what the drafter learned before. snapshot_seconds: interval of snapshots of a shared drafter's memory,
    from which its replacement starts. division: how the target is divided over a process group; None is one process.
    cache, cache_budget, cache_statistics: what the target's KV caches keep, see load_target.
    """

    target: Path
    vocabulary: int
    verifier: Verifier
    drafter: Drafter | None = None
    draft: Path | None = None
    dtype: torch.dtype = torch.float32
    other_dtypes: tuple[torch.dtype, ...] = ()
    device: str = "cpu"
    threads: int = 1
    path: str = "auto"
    compiled: bool = False
    in_flight: int = 8
    prefill_chunk: int = 512
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    draft_length: DraftLength = field(kw_only=True)
    max_draft_tokens: int = 32
    memory_bytes: int | None = None
    learned: Mapping[str, Tensor] | None = None
    snapshot_seconds: float = 10.0
    division: Division | None = None
    cache: CacheMethod | None = None
    cache_budget: CacheBudget | None = None
    cache_statistics: Path | None = None


def make_memory(spec: DecodeSpec, learned: Sequence[Mapping[str, Tensor]], target: Target | None = None) -> Any:
    """The drafter's memory, including what was learned before: a whole state, and later changes in their order.

    target: the target of this process; None in the process of a shared drafter.
    """
    assert spec.drafter is not None
    draft = spec.draft
    hidden = spec.drafter.needs_hidden
    load = None
    if draft is not None:
        load = partial(load_target, draft, spec.dtype, spec.device, spec.path, hidden, spec.compiled)
    memory = spec.drafter.new_memory(Models(spec.vocabulary, load, draft, target, spec.target))
    for index, part in enumerate(learned):
        (spec.drafter.update if index else spec.drafter.load)(memory, part)
    return memory


def sharing_refusal(spec: DecodeSpec, sampling: Sampling) -> str | None:
    """Why the drafter cannot be shared; None if it can. A shared drafter sends no distributions to the verifier."""
    if spec.drafter is not None and spec.drafter.reads_target:
        return (
            f"placement=shared does not work with drafter={type(spec.drafter).__name__}, which reads hidden states of "
            "the target: use placement=private"
        )
    if spec.drafter is None or not spec.verifier.reads_draft_probs:
        return None
    if all(kind.draft_sampling is DraftSampling.DETERMINISTIC for kind in spec.drafter.kinds(sampling)):
        return None
    return (
        f"placement=shared does not work with verifier={type(spec.verifier).__name__} and random drafts: the verifier "
        "needs their distributions, which a shared drafter does not send; use placement=private or "
        "verifier=sample_and_match"
    )


class VerifierActor:
    """A target in one process, with a private drafter or a connection to a shared one, which knows it as `client`."""

    def __init__(self, spec: DecodeSpec, client: str) -> None:
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._spec, self._client = spec, client
        self._target: Target | None = None
        self._drafter: Drafter | None = None
        self._memory: Any = None
        self._costs: PassCosts | None = None
        self._policy: LengthController | None = None
        self._stop_strings: StopStrings | None = None
        self._cpu_before = cpu_seconds()

    def prepare(self) -> Target:
        """The target, loaded at the first call."""
        if self._target is None:
            self._target = self._load(self._spec.dtype)
            self._cpu_before = cpu_seconds()
        return self._target

    def loaded(self) -> None:
        """Return once the target is loaded."""
        self.prepare()

    def connect(self, shared: Address | None) -> None:
        """Connect to the shared drafter at an address, or build a private one for None; no effect the second time."""
        if self._spec.drafter is None or self._drafter is not None:
            return
        if shared is None:
            learned = [self._spec.learned] if self._spec.learned else []
            self._drafter, self._memory = self._spec.drafter, make_memory(self._spec, learned, self.prepare())
        else:
            self._drafter, self._memory = RemoteDrafter(self._spec.drafter), Connection(shared, self._client)

    def costs(self, shared: Address, sequences: int, nodes: int) -> tuple[float, float]:
        """Median seconds of a round trip to a shared drafter, and of a pass of the target."""
        connection = Connection(shared, self._client)
        payload = [([0] * nodes, [0] * nodes)] * sequences
        trips = [connection.ping(payload) for _ in range(2 * _TRIPS)][_TRIPS:]  # the first ones open the connection
        return statistics.median(trips), self._passes().seconds(nodes + 1, sequences)

    def rate(self, dtype: torch.dtype) -> float:
        """Expected tokens per second of the target in a dtype, with the prior acceptance of drafts."""
        self.use(dtype)
        max_nodes = 0 if self._spec.drafter is None else self._spec.max_draft_tokens
        return expected_rate(self._passes(), max_nodes, self._spec.in_flight)

    def use(self, dtype: torch.dtype) -> None:
        """Decode in this dtype from now on."""
        if dtype != self._spec.dtype:
            self._spec = replace(self._spec, dtype=dtype)
            self._target = self._costs = None

    def target_efficiency(self, sequences: int, nodes: int) -> float:
        """Time of a pass over one token a sequence, divided by that with `nodes` draft tokens more (MoESD)."""
        return self._passes().efficiency(1 + nodes, sequences)

    def ties(self, decoded: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ties:
        """Check greedily decoded (prompt, tokens) in a reduced dtype against a float32 target, which is loaded here."""
        exact = self._load(torch.float32)
        return Ties.total(check_ties(exact, prompt, tokens, self._spec.dtype) for prompt, tokens in decoded)

    def _load(self, dtype: torch.dtype) -> Target:
        """A new target."""
        spec = self._spec
        caches: dict[str, Any] = {
            "cache": spec.cache,
            "cache_budget": spec.cache_budget,
            "cache_statistics": spec.cache_statistics,
        }
        return load_target(spec.target, dtype, spec.device, spec.path, compiled=spec.compiled, **caches)

    def _engine(self, on_tokens: OnTokens | None = None) -> Engine:
        """A decoding loop; the length controller keeps its state over assignments."""
        spec, target = self._spec, self.prepare()
        if self._policy is None and self._drafter is not None:
            self._policy = spec.draft_length.start(self._passes, spec.max_draft_tokens)
        if spec.stop_strings and self._stop_strings is None:
            self._stop_strings = StopStrings(spec.stop_strings, AutoTokenizer.from_pretrained(spec.target))
        return Engine(
            target,
            self._drafter,
            spec.verifier,
            memory=self._memory,
            policy=self._policy,
            stop=spec.stop,
            stop_strings=self._stop_strings,
            in_flight=spec.in_flight,
            prefill_chunk=spec.prefill_chunk,
            memory_bytes=spec.memory_bytes,
            on_tokens=on_tokens,
            # The CPU time of this process would not include that of a drafter in another process.
            draft_clock=perf_counter if isinstance(self._drafter, RemoteDrafter) else None,
        )

    def _passes(self) -> PassCosts:
        """Costs of the target's passes, measured at the first call, which empties the target's caches."""
        if self._costs is None:
            spec = self._spec
            max_nodes = spec.draft_length.max_tokens(spec.max_draft_tokens)
            widths = [1 << power for power in range((max_nodes + 1).bit_length())]
            self._costs = measure_costs(self.prepare(), [*widths, max_nodes + 1], spec.in_flight)
        return self._costs

    def decode(
        self, requests: Sequence[Request], shared: Address | None, stream: bool
    ) -> Iterator[Result | tuple[str, list[int]]]:
        """Results as sequences end; with `stream` also (id, new ids) after every pass."""
        self.connect(shared)
        if not stream:
            yield from self._engine().decode(requests)
            return
        # The engine calls back from inside its loop, where a generator cannot yield.
        items: queue.Queue[Result | tuple[str, list[int]] | BaseException | None] = queue.Queue()
        engine = self._engine(lambda key, new: items.put((key, new)))

        def run() -> None:
            try:
                for result in engine.decode(requests):
                    items.put(result)
                items.put(None)
            except BaseException as error:
                items.put(error)

        threading.Thread(target=run, daemon=True).start()
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def learned(self) -> dict[str, Tensor]:
        """What the private drafter has learned; empty if the drafter is shared."""
        if self._drafter is None or isinstance(self._drafter, RemoteDrafter):
            return {}
        return dict(self._drafter.saved(self._memory))

    def usage(self) -> dict[str, float]:
        """CPU seconds since the target was loaded, and peak resident memory in bytes."""
        release_memory()
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}
