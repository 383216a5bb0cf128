"""What drafters that are made of drafters share: their members are asked, taught, saved and loaded one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory, Models, Outcome
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Combined(Drafter):
    """A drafter of several. Its memory is a tuple of theirs."""

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        # A config gives a list, which is no key of a sequence's state.
        object.__setattr__(self, "drafters", tuple(self.drafters))
        wrong = [drafter for drafter in self.drafters if not isinstance(drafter, Drafter)]
        if wrong or not self.drafters:
            raise UserError(f"drafters={list(self.drafters)} must be a list of drafters, one at least")

    @property
    def observes(self) -> int:  # type: ignore[override]
        """As many as the member that learns from most."""
        return max(drafter.observes for drafter in self.drafters)

    @property
    def observes_probs(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(drafter.observes and drafter.observes_probs for drafter in self.drafters)

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(drafter.needs_hidden for drafter in self.drafters)

    @property
    def needs_draft_model(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(drafter.needs_draft_model for drafter in self.drafters)

    @property
    def learns(self) -> bool:
        """Whether a member does."""
        return any(drafter.learns for drafter in self.drafters)

    def new_memory(self, models: Models) -> tuple[Memory, ...]:
        """A memory of each member."""
        return tuple(drafter.new_memory(models) for drafter in self.drafters)

    def begin(self, context: Context, memory: Memory) -> None:
        """Tell every member."""
        for drafter, its_memory in zip(self.drafters, memory, strict=True):
            drafter.begin(context, its_memory)

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Every member learns, whoever's draft it was."""
        for drafter, its_memory in zip(self.drafters, memory, strict=True):
            drafter.observe(its_memory, _seen_by(drafter, outcome))

    def end(self, context: Context, memory: Memory) -> None:
        """Tell every member."""
        for drafter, its_memory in zip(self.drafters, memory, strict=True):
            drafter.end(context, its_memory)

    def saved(self, memory: Memory) -> Mapping[str, Tensor]:
        """What each member learned, each name behind the member's place and a dot."""
        return {
            f"{index}.{name}": tensor
            for index, (drafter, its_memory) in enumerate(zip(self.drafters, memory, strict=True))
            for name, tensor in drafter.saved(its_memory).items()
        }

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Give every member its own."""
        for index, (drafter, its_memory) in enumerate(zip(self.drafters, memory, strict=True)):
            prefix = f"{index}."
            mine = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            if mine:
                drafter.load(its_memory, mine)


def _seen_by(drafter: Drafter, outcome: Outcome) -> Outcome:
    """The outcome with as many of the most probable ids as a drafter asks for."""
    count, tokens, probs = drafter.observes, outcome.top_tokens, outcome.top_probs
    if tokens is None or count == tokens.shape[1]:
        return outcome
    if not count:
        return replace(outcome, top_tokens=None, top_probs=None)
    return replace(outcome, top_tokens=tokens[:, :count], top_probs=None if probs is None else probs[:, :count])
