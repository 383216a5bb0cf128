"""The interface of drafters: a drafter proposes a tree of tokens, and may learn from the result of its verification."""

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

# State that a drafter shares between sequences, such as what it learned. Only the drafter knows its type.
Memory: TypeAlias = Any


@dataclass(frozen=True)
class Models:
    """What a drafter's memory is built from: the size of the vocabulary, and a draft model of the same tokenizer.

    draft: function that loads the draft model; None where none was given. draft_path: folder of its checkpoint, which
    also holds the heads that were trained for it.
    """

    vocabulary: int
    draft: Callable[[], Target] | None = None
    draft_path: Path | None = None

    def load_draft(self) -> Target:
        """The draft model; UserError where none was given."""
        if self.draft is None:
            raise UserError("this drafter needs a draft model: give draft=PATH")
        return self.draft()


@dataclass(frozen=True)
class Outcome:
    """Result of verifying a draft of N nodes.

    context: its tokens are those before the draft. tree: the verified draft. path: accepted nodes, from the root.
    token: the id after the last accepted node. top_tokens: (N + 1, k) int64, the target's most probable ids; row 0 is
    after the last committed token, row i + 1 after node i. top_probs: (N + 1, k) float32, their probabilities at
    temperature 1. Both are None unless the drafter's `observes` and `observes_probs` request them.
    """

    context: Context
    tree: DraftTree
    path: Sequence[int]
    token: int
    top_tokens: Tensor | None = None
    top_probs: Tensor | None = None

    @property
    def committed(self) -> list[int]:
        """Ids that are appended to the sequence: the accepted ones and the one after them."""
        return [*(self.tree.tokens[node] for node in self.path), self.token]

    def with_top_tokens(self, drafter: "Drafter", logits: Tensor) -> "Outcome":
        """The outcome with those top tokens of logits (N + 1, V) that a drafter observes."""
        if not drafter.observes:
            return self
        values, ids = most_probable(logits, drafter.observes)
        probs = None
        if drafter.observes_probs:
            probs = (values - logits.float().logsumexp(-1, keepdim=True)).exp().cpu()
        return replace(self, top_tokens=ids.cpu(), top_probs=probs)


class Drafter(ABC):
    """A method that proposes the target's next tokens; a frozen dataclass of hyper-parameters.

    All sequences share its memory, in which it learns. Its state of one sequence is `context.state[drafter]`.
    observes: number of most probable ids after every verified node that it learns from. observes_probs: whether it
    learns from their probabilities, too. needs_draft_model: whether it needs a draft model. needs_hidden: whether it
    reads the draft model's hidden states.
    """

    observes: ClassVar[int] = 0
    observes_probs: ClassVar[bool] = True
    needs_draft_model: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    @property
    def learns(self) -> bool:
        """Whether its memory changes while decoding, so that sequences benefit from sharing it."""
        return self.observes > 0 or type(self).saved is not Drafter.saved

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """How the children of a node are chosen."""
        return DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether no node ever has two children."""
        return False

    def new_memory(self, models: Models) -> Memory:
        """The initial memory; None for a drafter without one."""
        return None

    def begin(self, context: Context, memory: Memory) -> None:
        """Called when a sequence starts; its prompt is context.tokens."""
        return

    @abstractmethod
    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """A tree of at most `budget` >= 1 tokens after context.tokens; empty if the drafter has no proposal."""

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """A tree for each of several sequences."""
        return [self.propose(context, memory, budget) for context in contexts]

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Learn from a verified draft; called after every pass, before its tokens are appended to context.tokens."""
        return

    def end(self, context: Context, memory: Memory) -> None:
        """Called when a sequence has ended; frees its state."""
        return

    def saved(self, memory: Memory) -> Mapping[str, Tensor]:
        """What was learned, as tensors by name for a file; empty for a drafter that does not learn."""
        return {}

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Fill a new memory with tensors that `saved` returned."""
        return
