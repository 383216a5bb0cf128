"""The memory of every drafter with a draft model: the model, and the cache of each sequence in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.decoding.context import Context
from accel.decoding.drafters.base import Models
from accel.decoding.targets.base import Pass, Target
from accel.errors import UserError

_FIRST_CAPACITY = 1024


class SmallModel:
    """A draft model that sequences take turns in; each has a slot, which follows what was committed."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._slots: dict[int, int] = {}
        self.last: Pass | None = None

    @classmethod
    def of(cls, models: Models) -> "SmallModel":
        """UserError where no draft model was given."""
        if models.draft is None:
            raise UserError("this drafter needs a draft model: give draft=PATH")
        return cls(models.draft())

    @property
    def vocabulary(self) -> int:
        """V of the draft model."""
        return self.target.vocabulary

    def start(self, context: Context, nodes: int) -> Tensor | None:
        """Logits (V,) after the last committed token, with room for so many drafted ones.

        None where the sequence is longer than the draft model's context.
        """
        tokens = context.tokens
        if len(tokens) + nodes > self.target.max_length:
            return None
        slot = self._slot(context, len(tokens) + nodes)
        self.last = self.target.follow(slot, tokens)
        return self.last.logits[0, 0]

    def extend(self, context: Context, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Logits (N, V) after new nodes of the draft; parents count the nodes that were added since `start`."""
        self.last = self.target.forward([self._slots[id(context)]], [tokens], [parents])
        return self.last.logits[0]

    def probs(self, context: Context, logits: Tensor, path: Sequence[int]) -> Tensor:
        """Distribution (V,) float32 of logits (V,) under the request's sampling; path: drafted ids before this one."""
        sampling = context.sampling
        if sampling.has_penalty:
            logits = sampling.penalised(logits, torch.tensor([*context.tokens, *path], device=logits.device))
        return sampling.probs(logits)

    def end(self, context: Context) -> None:
        """The sequence ended; another may have its slot."""
        slot = self._slots.pop(id(context), None)
        if slot is not None:
            self.target.clear(slot)

    def _slot(self, context: Context, capacity: int) -> int:
        slots = max(1, self.target.slots)
        if id(context) not in self._slots:
            free = set(range(slots)) - set(self._slots.values())
            if not free:
                free, slots = {slots}, 2 * slots
            self._slots[id(context)] = min(free)
        if capacity > self.target.capacity or slots > self.target.slots:
            # What the caches held is computed again when the sequences go on: rare, because the room doubles.
            room = max(self.target.capacity, _FIRST_CAPACITY)
            while room < capacity:
                room *= 2
            self.target.reserve(slots, min(room, self.target.max_length))
        return self._slots[id(context)]
