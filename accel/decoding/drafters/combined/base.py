"""What drafters that are made of drafters share: their members are asked, taught, saved and loaded one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Combined(Drafter):
    """A drafter of several. Its memory is a tuple of theirs."""

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        # A config gives a list, which is no key of a sequence's state.
        object.__setattr__(self, "drafters", tuple(self.drafters))
        wrong = [each for each in self.drafters if not isinstance(each, Drafter)]
        if wrong or not self.drafters:
            raise UserError(f"drafters={list(self.drafters)} must be a list of drafters, one at least")

    @property
    def observes(self) -> int:  # type: ignore[override]
        """As many as the member that learns from most."""
        return max(each.observes for each in self.drafters)

    @property
    def observes_probs(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(each.observes and each.observes_probs for each in self.drafters)

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(each.needs_hidden for each in self.drafters)

    @property
    def needs_draft_model(self) -> bool:  # type: ignore[override]
        """Whether a member does."""
        return any(each.needs_draft_model for each in self.drafters)

    @property
    def learns(self) -> bool:
        """Whether a member does."""
        return any(each.learns for each in self.drafters)

    def new_memory(self, models: Models) -> tuple[Any, ...]:
        """A memory of each member."""
        return tuple(each.new_memory(models) for each in self.drafters)

    def begin(self, context: Context, memory: Any) -> None:
        """Tell every member."""
        for each, its in zip(self.drafters, memory, strict=True):
            each.begin(context, its)

    def observe(self, memory: Any, outcome: Outcome) -> None:
        """Every member learns, whoever's draft it was."""
        for each, its in zip(self.drafters, memory, strict=True):
            each.observe(its, _seen_by(each, outcome))

    def end(self, context: Context, memory: Any) -> None:
        """Tell every member."""
        for each, its in zip(self.drafters, memory, strict=True):
            each.end(context, its)

    def saved(self, memory: Any) -> Mapping[str, Tensor]:
        """What each member learned, each name behind the member's place and a dot."""
        return {
            f"{index}.{name}": tensor
            for index, (each, its) in enumerate(zip(self.drafters, memory, strict=True))
            for name, tensor in each.saved(its).items()
        }

    def load(self, memory: Any, tensors: Mapping[str, Tensor]) -> None:
        """Give every member its own."""
        for index, (each, its) in enumerate(zip(self.drafters, memory, strict=True)):
            prefix = f"{index}."
            mine = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            if mine:
                each.load(its, mine)


def _seen_by(drafter: Drafter, outcome: Outcome) -> Outcome:
    """The outcome with as many of the most probable ids as a drafter asks for."""
    count, tokens, probs = drafter.observes, outcome.top_tokens, outcome.top_probs
    if tokens is None or count == tokens.shape[1]:
        return outcome
    if not count:
        return replace(outcome, top_tokens=None, top_probs=None)
    return replace(outcome, top_tokens=tokens[:, :count], top_probs=None if probs is None else probs[:, :count])
