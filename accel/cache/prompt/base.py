"""Base class of methods that read a prompt's ids before it runs: to look ahead, to leave tokens out, or to share them.

`prompts.py` runs a prompt as such a method asks for it, for the decoding engine and in front of `generate()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

from torch import Tensor

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.segments.base import Segment


class Draft(Protocol):
    """A small model of the same tokenizer, or the target itself."""

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """The most probable tokens behind `tokens`; at most `count`, fewer where the text or the context ends."""
        ...

    def attention(self, tokens: Sequence[int], window: int, steps: int) -> list[Tensor]:
        """Attention (H * G, Q, T) float32 of each layer on T tokens.

        Queries are those of the last `window` tokens, or of all if there are fewer, and of `steps` tokens that the
        model itself puts behind them.
        """
        ...


@dataclass(frozen=True)
class Prompt:
    """tokens: ids. following: how many of the last of them are known already, but run as the first step of decoding.

    new: tokens that are decoded at most. contexts: ascending indices where the contexts among the tokens begin, and
    where the last one ends; () where there are none.
    """

    tokens: Sequence[int]
    following: int
    new: int
    contexts: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens that run before decoding."""
        return len(self.tokens) - self.following

    @property
    def saved_positions(self) -> int:
        """See the function."""
        return saved_positions(self.contexts)


def saved_positions(contexts: Sequence[int]) -> int:
    """By how much positions behind contexts are lower than indices, since all contexts begin at one position."""
    sizes = [stop - start for start, stop in pairwise(contexts)]
    return sum(sizes) - max(sizes, default=0)


@dataclass(frozen=True)
class Reading:
    """How a prompt is run. kept: ascending indices of the tokens that run; None: all of them.

    lookahead: ids that run behind the prompt for their queries' sake, and are dropped again.
    """

    kept: Sequence[int] | None = None
    lookahead: Sequence[int] = ()


class PromptMethod(CacheMethod):
    """A method that reads prompts.

    drafts: whether it asks a draft model. selects: whether some tokens of a prompt do not run, or not in one row.
    takes_contexts: whether it needs contexts.
    """

    drafts: ClassVar[bool] = False
    selects: ClassVar[bool] = True
    takes_contexts: ClassVar[bool] = False

    @property
    def shared_tokens(self) -> int | None:
        """Number of equal first tokens from which on sequences hold them together; None: they never do."""
        return None

    def read(self, prompt: Prompt, draft: Draft | None, budget: int | None) -> Reading:
        """How the prompt runs. draft: not None if the method asks one. budget: tokens that a layer may hold."""
        return Reading()

    def contexts(self, keys: Tensor, values: Tensor, positions: Tensor) -> Segment:
        """The segment of all contexts of a sequence: keys and values (H, T, D), positions (H, T)."""
        raise NotImplementedError(f"{type(self).__name__} has no contexts")


def takes_contexts(method: CacheMethod | None) -> bool:
    """Whether a method reads contexts beside the prompt."""
    return isinstance(method, PromptMethod) and method.takes_contexts


@dataclass(frozen=True)
class Drafting(PromptMethod):
    """A method that asks a draft model. draft: folder or name of one with the target's tokenizer; None: the target."""

    draft: str | None = None

    drafts: ClassVar[bool] = True
