"""Base class of drafters that combine other drafters; each member keeps a memory of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Combined(Drafter):
    """A drafter with several members. Its memory is the tuple of the members' memories."""

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        # A config gives a list, which is not hashable; a drafter is a key of Context.state.
        object.__setattr__(self, "drafters", tuple(self.drafters))
        wrong = [drafter for drafter in self.drafters if not isinstance(drafter, Drafter)]
        if wrong or not self.drafters:
            raise UserError(f"drafters={list(self.drafters)} must be a list of one or more drafters")

    @property
    def observes(self) -> int:  # type: ignore[override]
        """The largest number that a member observes."""
        return max(drafter.observes for drafter in self.drafters)

    @property
    def observes_probs(self) -> bool:  # type: ignore[override]
        """Whether any member observes probabilities."""
        return any(drafter.observes and drafter.observes_probs for drafter in self.drafters)

    @property
    def observes_prompt(self) -> int:  # type: ignore[override]
        """The largest number that a member observes."""
        return max(drafter.observes_prompt for drafter in self.drafters)

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether any member reads hidden states."""
        return any(drafter.needs_hidden for drafter in self.drafters)

    @property
    def needs_draft_model(self) -> bool:  # type: ignore[override]
        """Whether any member needs a draft model."""
        return any(drafter.needs_draft_model for drafter in self.drafters)

    @property
    def reads_target(self) -> bool:  # type: ignore[override]
        """Whether any member reads the target's hidden states."""
        return any(drafter.reads_target for drafter in self.drafters)

    def target_layers(self, memory: Memory) -> tuple[int, ...]:
        """The members' layers, next to each other."""
        return sum((drafter.target_layers(own) for drafter, own in zip(self.drafters, memory, strict=True)), ())

    def observe_features(self, memory: Memory, context: Context, start: int, features: Tensor) -> None:
        """Every member that reads the target receives its own layers."""
        counts = [len(drafter.target_layers(own)) for drafter, own in zip(self.drafters, memory, strict=True)]
        size = features.shape[-1] // sum(counts)
        parts = features.split([count * size for count in counts], -1)
        for drafter, own, part in zip(self.drafters, memory, parts, strict=True):
            if part.shape[-1]:
                drafter.observe_features(own, context, start, part)

    @property
    def learns(self) -> bool:
        """Whether any member learns."""
        return any(drafter.learns for drafter in self.drafters)

    def check_target(self, target: Path) -> None:
        """Check every member."""
        for drafter in self.drafters:
            drafter.check_target(target)

    def new_memory(self, models: Models) -> tuple[Memory, ...]:
        """The initial memory of each member; UserError for one that puts virtual tokens into passes."""
        memories = tuple(drafter.new_memory(models) for drafter in self.drafters)
        for drafter, memory in zip(self.drafters, memories, strict=True):
            if drafter.virtual_tokens(memory) is not None:
                name = type(drafter).__name__
                raise UserError(f"{name} cannot be combined: it needs the target's passes for its own tokens")
        return memories

    def reserve(self, memory: Memory, slots: int, longest: int, budget: int) -> None:
        """Reserve in every member."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.reserve(member_memory, slots, longest, budget)

    def needed_bytes(self, memory: Memory, slots: int, longest: int, budget: int) -> int:
        """The sum over the members."""
        return sum(
            drafter.needed_bytes(member_memory, slots, longest, budget)
            for drafter, member_memory in zip(self.drafters, memory, strict=True)
        )

    def begin(self, context: Context, memory: Memory) -> None:
        """Start the sequence in every member."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.begin(context, member_memory)

    def observe_prompt(
        self, memory: Memory, context: Context, start: int, top_tokens: Tensor, top_probs: Tensor | None
    ) -> None:
        """Every member that observes prompts learns from it."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            if drafter.observes_prompt:
                tokens = top_tokens[:, : drafter.observes]
                probs = None if top_probs is None else top_probs[:, : drafter.observes]
                drafter.observe_prompt(member_memory, context, start, tokens, probs)

    def prefill(self, contexts: Sequence[Context], memory: Memory, budget: int) -> None:
        """Prefill the sequences in every member."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.prefill(contexts, member_memory, budget)

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Every member learns, whichever member proposed the draft."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.observe(member_memory, _restricted_to(drafter, outcome))

    def truncate(self, context: Context, length: int) -> None:
        """Truncate the sequence in every member."""
        for drafter in self.drafters:
            drafter.truncate(context, length)

    def end(self, context: Context, memory: Memory) -> None:
        """End the sequence in every member."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.end(context, member_memory)

    def saved(self, memory: Memory) -> Mapping[str, Tensor]:
        """What each member learned; names are INDEX.NAME with the member's index."""
        return {
            f"{index}.{name}": tensor
            for index, (drafter, member_memory) in enumerate(zip(self.drafters, memory, strict=True))
            for name, tensor in drafter.saved(member_memory).items()
        }

    def changes(self, memory: Memory, whole: bool = False) -> Mapping[str, Tensor]:
        """What each member learned since the last call; names are as in `saved`."""
        return {
            f"{index}.{name}": tensor
            for index, (drafter, member_memory) in enumerate(zip(self.drafters, memory, strict=True))
            for name, tensor in drafter.changes(member_memory, whole).items()
        }

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Load each member's tensors into its memory."""
        for drafter, member_memory, own in self._divided(memory, tensors):
            drafter.load(member_memory, own)

    def update(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Update each member's memory with its tensors."""
        for drafter, member_memory, own in self._divided(memory, tensors):
            drafter.update(member_memory, own)

    def _divided(
        self, memory: Memory, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[Drafter, Memory, Mapping[str, Tensor]]]:
        """Members that have tensors, with their memories."""
        for index, (drafter, member_memory) in enumerate(zip(self.drafters, memory, strict=True)):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if own:
                yield drafter, member_memory, own


def _restricted_to(drafter: Drafter, outcome: Outcome) -> Outcome:
    """The outcome with only as many of the most probable ids as a drafter observes."""
    count, tokens, probs = drafter.observes, outcome.top_tokens, outcome.top_probs
    if tokens is None or count == tokens.shape[1]:
        return outcome
    if not count:
        return replace(outcome, top_tokens=None, top_probs=None)
    return replace(outcome, top_tokens=tokens[:, :count], top_probs=None if probs is None else probs[:, :count])
