"""Base class of drafters that combine other drafters; each member keeps a memory of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether any member reads hidden states."""
        return any(drafter.needs_hidden for drafter in self.drafters)

    @property
    def needs_draft_model(self) -> bool:  # type: ignore[override]
        """Whether any member needs a draft model."""
        return any(drafter.needs_draft_model for drafter in self.drafters)

    @property
    def learns(self) -> bool:
        """Whether any member learns."""
        return any(drafter.learns for drafter in self.drafters)

    def new_memory(self, models: Models) -> tuple[Memory, ...]:
        """The initial memory of each member."""
        return tuple(drafter.new_memory(models) for drafter in self.drafters)

    def begin(self, context: Context, memory: Memory) -> None:
        """Start the sequence in every member."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.begin(context, member_memory)

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Every member learns, whichever member proposed the draft."""
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            drafter.observe(member_memory, _restricted_to(drafter, outcome))

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

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Load each member's tensors into its memory."""
        for index, (drafter, member_memory) in enumerate(zip(self.drafters, memory, strict=True)):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if own:
                drafter.load(member_memory, own)


def _restricted_to(drafter: Drafter, outcome: Outcome) -> Outcome:
    """The outcome with only as many of the most probable ids as a drafter observes."""
    count, tokens, probs = drafter.observes, outcome.top_tokens, outcome.top_probs
    if tokens is None or count == tokens.shape[1]:
        return outcome
    if not count:
        return replace(outcome, top_tokens=None, top_probs=None)
    return replace(outcome, top_tokens=tokens[:, :count], top_probs=None if probs is None else probs[:, :count])
