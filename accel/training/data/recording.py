"""Records what a target computes: while it decodes answers, which costs no pass of its own, or over given texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.training.data.records import Record


@dataclass
class _Recorded:
    features: list[Tensor] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    top_probs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Recorder(Drafter):
    """A drafter that drafts nothing and keeps what the target computes. layers: see `Target.feature_layers`. top: K."""

    layers: tuple[int, ...]
    top: int = 16
    reads_target: ClassVar[bool] = True

    @property
    def observes(self) -> int:  # type: ignore[override]
        """The number of most probable ids that are kept."""
        return self.top

    def new_memory(self, models: Models) -> list[Record]:
        """The records of the sequences that have ended."""
        return []

    def target_layers(self, memory: Memory) -> tuple[int, ...]:
        """The layers to keep."""
        return self.layers

    def observe_features(self, memory: Memory, context: Context, start: int, features: Tensor) -> None:
        """Keep features in bfloat16."""
        self._of(context).features.append(features.to(torch.bfloat16).cpu())

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """Nothing."""
        return DraftTree()

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Keep the most probable ids after the last committed token."""
        assert outcome.top_tokens is not None
        assert outcome.top_probs is not None
        recorded = self._of(outcome.context)
        recorded.top_ids.append(outcome.top_tokens[:1].int())
        recorded.top_probs.append(outcome.top_probs[:1])

    def _of(self, context: Context) -> _Recorded:
        recorded: _Recorded = context.state.setdefault(self, _Recorded())
        return recorded

    def end(self, context: Context, memory: list[Record]) -> None:
        """Add the record of a sequence; its last token, which has not run, is left out. Answers are learned."""
        recorded = self._of(context)
        features = torch.cat(recorded.features)
        count = len(features)
        answered = torch.cat(recorded.top_ids)
        # Row 0 is after the prompt's last token.
        before = context.prompt_length - 1
        top_ids = torch.zeros(count, self.top, dtype=torch.int32)
        top_log_probs = torch.full((count, self.top), -torch.inf, dtype=torch.float16)
        rows = min(len(answered), count - before)
        top_ids[before : before + rows] = answered[:rows]
        top_log_probs[before : before + rows] = torch.cat(recorded.top_probs)[:rows].log().half()
        learned = torch.zeros(count, dtype=torch.bool)
        learned[context.prompt_length :] = True
        memory.append(Record(torch.tensor(context.tokens[:count]), learned, features, top_ids, top_log_probs))


def record_answers(
    target: Target, requests: Sequence[Request], recorder: Recorder, stop: Sequence[int] = (), in_flight: int = 32
) -> Iterator[tuple[str, Record]]:
    """(id, record) of each request as its answer ends; the answer is what the target decodes without drafts."""
    engine = Engine(target, recorder, policy=Fixed(0), stop=stop, in_flight=in_flight)
    for result in engine.decode(requests):
        yield result.id, engine.memory.pop()  # that of the sequence that has just ended


@torch.no_grad()
def record_texts(
    target: Target,
    sequences: Sequence[tuple[Sequence[int], Sequence[bool]]],
    recorder: Recorder,
    chunk: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Record]:
    """A record of each (ids, learned) sequence: one pass over every text, `chunk` tokens at a time."""
    target.feature_layers = recorder.layers
    target.reserve(1, max(len(tokens) for tokens, _ in sequences) + 1)
    for number, (tokens, learned) in enumerate(sequences, 1):
        target.clear(0)
        features, top_ids, top_log_probs = [], [], []
        for start in range(0, len(tokens), chunk):
            part = list(tokens[start : start + chunk])
            rows = target.forward([0], [part], [range(ROOT, len(part) - 1)])
            target.commit(0, range(len(part)))
            assert rows.features is not None
            features.append(rows.features[0].to(torch.bfloat16).cpu())
            log_probs, ids = rows.logits[0].float().log_softmax(-1).topk(recorder.top, -1)
            top_ids.append(ids.int().cpu())
            top_log_probs.append(log_probs.half().cpu())
        yield Record(
            torch.tensor(list(tokens)),
            torch.tensor(list(learned)),
            torch.cat(features),
            torch.cat(top_ids),
            torch.cat(top_log_probs),
        )
        progress(number)
