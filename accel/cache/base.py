"""Base class of cache methods: how the keys and values of a sequence's tokens are kept in one layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


@dataclass(frozen=True)
class Recent:
    """Dense keys and values (H, T, D) at positions (T,) that were committed and are not in a segment yet.

    queries: (W, H * G, D) of the last committed tokens, W of them as the method's `query_window` says; None where it
    needs none. attention: (H, T') float32, sum of the attention that each token of the segments and of these tokens
    received from all committed queries, over the query heads of a KV head; None where the method does not sum it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What a method makes of a sequence's cache in a layer.

    segments: in place of all earlier ones. recent: number of the newest dense tokens that stay as they are. kept: (H,
    T'') indices, in the order of the new segments and then of the recent tokens, into the earlier segments' tokens and
    the dense ones behind them; None where all tokens are kept. Needed where the method sums attention.
    """

    segments: Sequence[Segment]
    recent: int
    kept: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a cache is compressed. layer: its number, of `layers`. length: committed tokens of the sequence.

    budget: tokens that the layer may hold of the sequence; None: the method has none. scoring: of its attention.
    """

    layer: int
    layers: int
    length: int
    budget: int | None
    scoring: Scoring


class CacheMethod(ABC):
    """A way to keep a cache small. Subclasses are frozen dataclasses.

    When it is applied depends on the number of committed tokens alone, and not on the passes that committed them: at
    the end of the prompt, and then after every `interval` tokens. So speculative decoding gives the same caches.

    has_budget: whether the method keeps a budget. query_window: number of last queries that it reads. sums_attention:
    whether it reads the summed attention. interval: committed tokens between two compressions after the prompt.
    """

    has_budget: ClassVar[bool] = True
    sums_attention: ClassVar[bool] = False

    @property
    def interval(self) -> int:
        """Tokens between compressions; up to so many more than the budget are held."""
        return 32

    @property
    def query_window(self) -> int:
        """Number of last queries that `compress` reads."""
        return 0

    @abstractmethod
    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """What to keep; None leaves everything as it is."""


@dataclass(frozen=True)
class CacheBudget:
    """Tokens of a sequence that a cache may hold. value: up to 1 a share of the sequence's tokens, above it tokens."""

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0 or (self.value > 1 and self.value != int(self.value)):
            raise UserError(f"cache_budget={self.value:g} is wrong: a share up to 1, or a whole number of tokens")

    def tokens(self, length: int) -> int:
        """Tokens of a sequence of this length."""
        return ceil(self.value * length) if self.value <= 1 else int(self.value)


def check_budget(method: CacheMethod, budget: CacheBudget | None) -> None:
    """UserError where a method lacks a budget, or has no use for one."""
    name = type(method).__name__
    if method.has_budget and budget is None:
        raise UserError(f"cache={name} keeps a budget: give cache_budget, a share of the sequence up to 1, or tokens")
    if budget is not None and not method.has_budget:
        raise UserError(f"cache={name} has no budget: leave out cache_budget={budget.value:g}")
