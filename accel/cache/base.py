"""Base class of cache methods: how the keys and values of a sequence's tokens are kept in one layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar

from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring

# rotate(keys, positions, inverse): keys (H, T, D) rotated for positions (H, T).
Rotation = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Lookahead:
    """Queries (W, H * G, D) at positions (W,) of tokens that a draft model expects behind the prompt.

    denominators: (W, H * G), logarithms of the sums of exp(score) over all that they see.
    """

    queries: Tensor
    positions: Tensor
    denominators: Tensor


@dataclass(frozen=True)
class Recent:
    """Dense keys and values (H, T, D) at positions (T,) that were committed and are not in a segment yet.

    queries: (W, H * G, D) of the last committed tokens, at most as many as the method's `query_window` says; None where
    it needs none. attention: (H, T') float32, sum of the attention that each token of the segments and of these tokens
    received from all committed queries, over the query heads of a KV head; None where the method does not sum it.
    memory: what the method remembered when it was last applied to the sequence in this layer, None at first; tensors in
    it count as held only if it is one tensor. lookahead: None but at the end of a prompt behind which tokens ran. ends:
    (T,) bool, whether a token ends a sentence; None where the method does not read it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None = None
    attention: Tensor | None = None
    memory: Any = None
    lookahead: Lookahead | None = None
    ends: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What a method makes of a sequence's cache in a layer.

    segments: in place of all earlier ones. recent: number of the newest dense tokens that stay as they are. kept: (H,
    T'') indices, in the order of the new segments and then of the recent tokens, into the earlier segments' tokens and
    the dense ones behind them; None where all tokens are kept. Needed where the method sums attention. memory: see
    Recent.
    """

    segments: Sequence[Segment]
    recent: int
    kept: Tensor | None = None
    memory: Any = None


@dataclass(frozen=True)
class Place:
    """Where a cache is compressed. layer: its number, of `layers`. length: committed tokens of the sequence.

    budget: tokens that the layer may hold of the sequence; None: the method has none. scoring: of its attention.
    shared: what the layers of the sequence tell each other in a pass, by any names. rotary: rotates keys (H, T, D) for
    positions (H, T), or back; None unless the method needs it. statistics: calibrated ones of the method in this layer,
    see calibrated.py; None where there are none.
    """

    layer: int
    layers: int
    length: int
    budget: int | None
    scoring: Scoring
    shared: dict[str, Any] = field(default_factory=dict)
    rotary: Rotation | None = None
    statistics: Mapping[str, Tensor] | None = None


class CacheMethod(ABC):
    """A way to keep a cache small. Subclasses are frozen dataclasses.

    When it is applied depends on the number of committed tokens alone, and not on the passes that committed them: at
    the end of the prompt, and then after as many tokens as `interval_of` says of the prompt's budget, again and again.
    So speculative decoding gives the same caches.

    has_budget: whether the method keeps a budget. frees: whether it holds less than everything; a method that does not
    reads less. joins_layers: whether all layers of a sequence are compressed together, by compress_layers; a cache is
    then compressed when the last layer has attended, and not layer by layer. query_window: number of last queries that
    it reads. forgets_queries: whether they are dropped when it has read them, so that it next reads those of the tokens
    since then alone. sums_attention: whether it reads the summed attention. needs_rotary: whether it takes the rotation
    out of keys. guided: whether it retrieves by `guide`; it has a query_window then. reads_ends: whether it reads which
    tokens end a sentence. reads_layers: whether a layer reads what other layers with the method leave in
    `Place.shared`.
    interval: committed tokens between two compressions after the prompt; more of them with a large budget, see
    interval_of.
    """

    has_budget: ClassVar[bool] = True
    frees: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = False
    forgets_queries: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    sums_attention: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    reads_ends: ClassVar[bool] = False
    reads_layers: ClassVar[bool] = False

    @property
    def interval(self) -> int:
        """Tokens between compressions; up to so many more than the budget are held."""
        return 32

    def interval_of(self, budget: int | None) -> int:
        """`interval` of a layer that may hold `budget` tokens of a prompt, None: any number; a multiple of it."""
        return self.interval

    @property
    def query_window(self) -> int:
        """Number of last queries that `compress` reads."""
        return 0

    def guide(self, queries: Tensor, seen: Tensor, ends: Tensor | None) -> Tensor:
        """What W queries retrieve by, (W, H * G, D): made of their own and of those of the tokens before them.

        queries: (R, H * G, D), in the order of their tokens. seen: (W, R) bool, the last `query_window` of them up to
        each query's own. ends: (R,) bool, see Recent.
        """
        raise NotImplementedError

    @abstractmethod
    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """What to keep in a layer; None leaves everything as it is."""

    def compress_layers(self, layers: Sequence[tuple[Sequence[Segment], Recent, Place]]) -> Sequence[Kept | None]:
        """What to keep in each layer of a sequence, of methods that join layers."""
        return [self.compress(*layer) for layer in layers]

    def level_of(self, layer: int, layers: int, budget: "CacheBudget | None") -> "CacheLevel":
        """What a layer, of `layers`, keeps; other than the method itself only where a method mixes others."""
        return CacheLevel(self, budget)


@dataclass(frozen=True)
class CacheBudget:
    """Tokens that each layer's cache may hold of a sequence, or bytes of all layers together.

    value: up to 1 a share of the sequence's tokens, above it tokens. in_bytes: value is bytes, which the method keeps
    when it is applied: tokens between, as many as its interval at most, come on top.
    """

    value: float
    in_bytes: bool = False

    def __post_init__(self) -> None:
        if self.in_bytes:
            if self.value < 1 or self.value != int(self.value):
                raise UserError(f"{self} is wrong: a whole number of bytes")
        elif not self.value > 0 or (self.value > 1 and self.value != int(self.value)):
            raise UserError(f"{self} is wrong: a share up to 1, or a whole number of tokens")

    def __str__(self) -> str:
        return f"cache_budget_bytes={self.value:.0f}" if self.in_bytes else f"cache_budget={self.value:g}"

    def tokens(self, length: int) -> int:
        """Tokens of a sequence of this length, of a budget that is not in bytes."""
        assert not self.in_bytes
        return ceil(self.value * length) if self.value <= 1 else int(self.value)


@dataclass(frozen=True)
class CacheLevel:
    """A method with its budget: what one layer keeps."""

    method: CacheMethod
    budget: CacheBudget | None = None


def check_budget(method: CacheMethod, budget: CacheBudget | None) -> None:
    """UserError where a method lacks a budget, or has no use for one."""
    name = type(method).__name__
    if method.has_budget and budget is None:
        raise UserError(f"cache={name} keeps a budget: give cache_budget, a share of the sequence up to 1, or tokens")
    if budget is not None and not method.has_budget:
        raise UserError(f"cache={name} has no budget: leave out {budget}")
    if budget is not None and budget.in_bytes and not method.frees:
        raise UserError(f"cache={name} holds all tokens, so {budget} cannot be kept: give cache_budget in tokens")
