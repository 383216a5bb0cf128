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
from hasten.accel.decoding.targets.virtual import VirtualTokens
from hasten.accel.decoding.tree import ROOT, DraftKind, DraftSampling, DraftTree, VirtualNodes
from hasten.accel.errors import UserError

# State that a drafter shares between sequences, such as what it learned. Only the drafter knows its type.
Memory: TypeAlias = Any


@dataclass(frozen=True)
class Models:
    """What a drafter's memory is built from: the size of the vocabulary, and a draft model of the same tokenizer.

    draft: function that loads the draft model; None where none was given. draft_path: folder of its checkpoint, which
    also holds the heads that were trained for it. target, target_path: the target that is drafted for, for drafters
    that read its hidden states; None where they are not at hand, such as in the process of a shared drafter.
    """

    vocabulary: int
    draft: Callable[[], Target] | None = None
    draft_path: Path | None = None
    target: Target | None = None
    target_path: Path | None = None

    def load_draft(self) -> Target:
        """The draft model; UserError where none was given."""
        if self.draft is None:
            raise UserError("this drafter needs a draft model: give draft=PATH")
        return self.draft()


@dataclass(frozen=True)
class Outcome:
    """Result of verifying a draft of N nodes.

    context: its tokens are those before the draft. tree: the verified draft. path: accepted nodes, from the root.
    token: the id after the last accepted node. ended: whether the sequence ends with the last accepted node, such as a
    stop token; then `token` is not committed. top_tokens: (N + 1, k) int64, the target's most probable ids; row 0 is
    after the last committed token, row i + 1 after node i. top_probs: (N + 1, k) float32, their probabilities at
    temperature 1. Both are None unless the drafter's `observes` and `observes_probs` request them.
    """

    context: Context
    tree: DraftTree
    path: Sequence[int]
    token: int
    top_tokens: Tensor | None = None
    top_probs: Tensor | None = None
    ended: bool = False

    @property
    def committed(self) -> list[int]:
        """Ids that are appended to the sequence: the accepted ones and the one after them."""
        accepted = [self.tree.tokens[node] for node in self.path]
        return accepted if self.ended else [*accepted, self.token]

    @property
    def decided(self) -> list[int]:
        """Nodes, ROOT included, after which the committed sequence has a token: there drafted children are verified."""
        nodes = [ROOT, *self.path]
        return nodes[:-1] if self.ended else nodes

    def with_top_tokens(self, drafter: "Drafter", logits: Tensor) -> "Outcome":
        """The outcome with those top tokens of logits (N + 1, V) that a drafter observes."""
        if not drafter.observes:
            return self
        top_tokens, top_probs = top_tokens_of(drafter, logits)
        return replace(self, top_tokens=top_tokens, top_probs=top_probs)


def top_tokens_of(drafter: "Drafter", logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a drafter observes of logits (N, V): ids (N, k) int64, and probabilities (N, k) float32 if it reads them."""
    _, ids = most_probable(logits, drafter.observes)
    probs = None
    if drafter.observes_probs:
        # On a CPU a softmax takes half the time of the logarithm of its denominator alone.
        probs = logits.float().softmax(-1).gather(-1, ids).cpu()
    return ids.cpu(), probs


class Drafter(ABC):
    """A method that proposes the target's next tokens; a frozen dataclass of hyper-parameters.

    All sequences share its memory, in which it learns. Its state of one sequence is `context.state[drafter]`.
    observes: number of most probable ids after every verified node that it learns from. observes_probs: whether it
    learns from their probabilities, too. observes_prompt: number of tokens at the end of a prompt after which it learns
    from them as well, which costs the target's output layer for these tokens. needs_draft_model: whether it needs a
    draft model. needs_hidden: whether it reads the draft model's hidden states. reads_target: whether it reads the
    target's, so that it must run in the process of the target.
    """

    observes: ClassVar[int] = 0
    observes_probs: ClassVar[bool] = True
    observes_prompt: ClassVar[int] = 0
    needs_draft_model: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    reads_target: ClassVar[bool] = False

    @property
    def learns(self) -> bool:
        """Whether its memory changes while decoding, so that sequences benefit from sharing it."""
        return self.observes > 0 or type(self).saved is not Drafter.saved

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """How the children of a node are chosen for a request of this sampling, if they may be drawn."""
        return DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether no node ever has two children."""
        return False

    def kinds(self, sampling: Sampling) -> frozenset[DraftKind]:
        """The kinds of its drafts; several if it combines drafters. `Context.drafting` is the sampling of drafts."""
        return frozenset({DraftKind(self.draft_sampling(sampling), self.chains())})

    def check_target(self, target: Path) -> None:
        """UserError unless what was trained for it fits the target in this folder; called before all else."""
        return

    def new_memory(self, models: Models) -> Memory:
        """The initial memory; None for a drafter without one."""
        return None

    def reserve(self, memory: Memory, slots: int, longest: int, budget: int) -> None:
        """Called before `slots` sequences of up to `longest` tokens are decoded at once; budget: tokens of a draft."""
        return

    def needed_bytes(self, memory: Memory, slots: int, longest: int, budget: int) -> int:
        """Bytes of caches and logits after such a `reserve`, weights not counted; 0 for a drafter without a model."""
        return 0

    def begin(self, context: Context, memory: Memory) -> None:
        """Called when a sequence starts; its prompt is context.tokens."""
        return

    def observe_prompt(
        self, memory: Memory, context: Context, start: int, top_tokens: Tensor, top_probs: Tensor | None
    ) -> None:
        """Learn from a part of a prompt, after `begin`; the parts are in order and end before the prompt's last token.

        top_tokens (N, k) int64 and top_probs (N, k) float32 are the target's after context.tokens[start], ….
        """
        return

    def target_layers(self, memory: Memory) -> tuple[int, ...]:
        """Hidden states of the target that it reads, as numbers of `Target.feature_layers`."""
        return ()

    def observe_features(self, memory: Memory, context: Context, start: int, features: Tensor) -> None:
        """Receive features (N, F * D) of N >= 1 committed tokens of the sequence, the first at index `start`.

        Every token's arrive once, in order, after `begin` and before the draft that follows them: all except the last
        committed token's, which has not run yet.
        """
        return

    def virtual_tokens(self, memory: Memory) -> VirtualTokens | None:
        """The virtual tokens that it puts into the target's passes; None for none."""
        return None

    def max_virtual_nodes(self, memory: Memory, budget: int) -> int:
        """How many of the `budget` nodes of a pass are virtual, at most; those of the draft are then fewer."""
        return 0

    def virtual_nodes(self, context: Context, memory: Memory, tree: DraftTree, budget: int) -> VirtualNodes:
        """At most `budget` - len(tree) virtual nodes behind the draft that is verified; budget: that of `propose`."""
        return VirtualNodes(len(tree))

    def observe_virtual(self, memory: Memory, context: Context, numbers: Sequence[int], logits: Tensor) -> None:
        """Receive logits (M, V) of the virtual nodes that hang on the last accepted node, in the order of the pass.

        numbers: of their virtual tokens, none or more. Called after the new tokens were appended to context.tokens, and
        not if the sequence ended inside the draft.
        """
        return

    def prefill(self, contexts: Sequence[Context], memory: Memory, budget: int) -> None:
        """Process tokens that are many and new, such as a prompt; called before drafts of at most `budget` tokens.

        Its time is not part of the time of drafting, by which adaptive draft lengths decide whether drafting pays: it
        is spent once for a sequence, whatever is drafted.
        """
        return

    @abstractmethod
    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """A tree of at most `budget` >= 1 tokens after context.tokens; empty if the drafter has no proposal."""

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """A tree for each of several sequences."""
        return [self.propose(context, memory, budget) for context in contexts]

    def observe(self, memory: Memory, outcome: Outcome) -> None:
        """Learn from a verified draft; called before its tokens are appended to context.tokens.

        It is called after every pass, except while an adaptive draft length pauses drafting for long.
        """
        return

    def truncate(self, context: Context, length: int) -> None:
        """Forget the tokens after the first `length`, which are about to change; context.tokens still has them.

        By default all state of the sequence is dropped; it is built again at the next draft.
        """
        context.state.pop(self, None)

    def end(self, context: Context, memory: Memory) -> None:
        """Called when a sequence has ended; frees its state."""
        return

    def saved(self, memory: Memory) -> Mapping[str, Tensor]:
        """What was learned, as tensors by name for a file; empty for a drafter that does not learn."""
        return {}

    def changes(self, memory: Memory, whole: bool = False) -> Mapping[str, Tensor]:
        """What was learned since the last call, as tensors by name; everything at the first call, or with `whole`.

        A memory is restored by `load` with the latest whole result, and `update` with all later ones in their order.
        """
        return self.saved(memory)

    def load(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Restore tensors that `saved` returned, or `changes` as a whole; what the memory has learned is dropped."""
        return

    def update(self, memory: Memory, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that `changes` returned to the memory."""
        self.load(memory, tensors)
