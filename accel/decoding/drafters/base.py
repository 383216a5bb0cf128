"""What a drafter is: it proposes a tree of tokens, and may learn from what becomes of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling, most_probable
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.errors import UserError

# What a drafter learned. Its type is the drafter's own; everybody else only passes it on.
Memory: TypeAlias = Any


@dataclass(frozen=True)
class Models:
    """What drafters may ask for: the size of the vocabulary, and a small model of the same tokenizer.

    draft: loads that model; None where no draft model was given. draft_path: folder of its checkpoint, which also holds
    the files that were trained for it.
    """

    vocabulary: int
    draft: Callable[[], Target] | None = None
    draft_path: Path | None = None

    def made_draft(self) -> Target:
        """The draft model; UserError where none was given."""
        if self.draft is None:
            raise UserError("this drafter needs a draft model: give draft=PATH")
        return self.draft()


@dataclass(frozen=True)
class Outcome:
    """What the target said about a draft. Node 0 is the last committed token; the draft's node i is node i + 1.

    context: with the tokens as they were before. tree: what was verified. path: the accepted nodes of the tree, from
    the top. token: the one after them. top_tokens: (N + 1, k) int64, the most probable ids after each node, and
    top_probs: (N + 1, k) float32, their probabilities at temperature one; None unless the drafter's `observes` asks.
    """

    context: Context
    tree: DraftTree
    path: Sequence[int]
    token: int
    top_tokens: Tensor | None = None
    top_probs: Tensor | None = None

    @property
    def committed(self) -> list[int]:
        """Ids that the sequence grows by."""
        return [*(self.tree.tokens[node] for node in self.path), self.token]

    def shown_to(self, drafter: "Drafter", logits: Tensor) -> "Outcome":
        """With as much of the logits (N + 1, V) as a drafter observes."""
        if not drafter.observes:
            return self
        values, ids = most_probable(logits, drafter.observes)
        probs = None
        if drafter.observes_probs:
            probs = (values - logits.float().logsumexp(-1, keepdim=True)).exp().cpu()
        return replace(self, top_tokens=ids.cpu(), top_probs=probs)


class Drafter(ABC):
    """A way to guess what the target will say; a frozen dataclass of hyper-parameters.

    What it learns while it runs is its memory, which sequences share; what it keeps of one sequence is in the
    context's state, under the drafter itself. observes: how many of the most probable ids after every verified node it
    learns from; observes_probs: whether their probabilities, too. needs_draft_model: whether it cannot do without one;
    needs_hidden: whether it reads that model's hidden states.
    """

    observes: ClassVar[int] = 0
    observes_probs: ClassVar[bool] = True
    needs_draft_model: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    @property
    def learns(self) -> bool:
        """Whether its memory grows with what is decoded, so that sequences gain by sharing it."""
        return self.observes > 0 or type(self).saved is not Drafter.saved

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """How the children of a node are chosen."""
        return DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether no node ever has two children."""
        return False

    def new_memory(self, models: Models) -> Memory:
        """Memory of a drafter that has seen nothing yet; None where there is nothing to remember."""
        return None

    def begin(self, context: Context, memory: Memory) -> None:
        """A sequence starts; its prompt is context.tokens."""
        return

    @abstractmethod
    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """At most `budget` tokens (one at least) to follow context.tokens; an empty tree where nothing is worth it."""

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """A tree for each of several sequences."""
        return [self.propose(context, memory, budget) for context in contexts]

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Learn from what the target said; called after every pass, before context.tokens grows."""
        return

    def end(self, context: Context, memory: Memory) -> None:
        """A sequence ended; what was held for it can go."""
        return

    def saved(self, memory: Memory) -> Mapping[str, Tensor]:
        """What was learned, as tensors to be saved; nothing for a drafter that does not learn."""
        return {}

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Put what was saved into a new memory."""
        return
