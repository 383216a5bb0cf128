"""The cache of one sequence in one layer: segments, then dense tokens, then nodes that wait for verification."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Lookahead, Recent
from hasten.accel.cache.segments.base import Segment, attention_shares, partial_attention, storage_bytes
from hasten.kernels.attention.contract import PLAIN, Partial, Scoring
from hasten.kernels.segment_attention import merged_attention
from hasten.kernels.segmented_token import Operands, Prepared, prepare, reads, segmented_token

# The dense part grows by this share of itself, and by so many tokens at least, so that a token is copied a few times at
# most. Methods that free memory take tokens out of it: room that is not used would be a good part of what they hold.
_GROWTH, _GROWTH_OF_FREED = 0.5, 0.125
_LEAST, _LEAST_OF_FREED = 32, 16
# Queries whose scores over all keys are held at a time.
QUERIES_AT_ONCE = 256
# Committed queries whose attention is summed at a time: one by one, each of them would read all keys again.
_SUMMED_AT_ONCE = 32


@dataclass(frozen=True)
class NewTokens:
    """Tokens of a pass. keys, values: (H, N, D). queries: (N, H * G, D). positions: (N,) int32.

    above: (N, waiting + N) bool, which waiting nodes, these included, each token sees; None for a chain behind the
    last committed token, with no node waiting. ends: (N,) bool, whether a token ends a sentence; None: not known.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    positions: Tensor
    above: Tensor | None = None
    ends: Tensor | None = None


class SequenceCache:
    """Keys and values of a sequence in one layer; tokens are appended, attended to, and then committed or dropped.

    length: number of committed tokens. segments: the older of them, as the method keeps them. interval: tokens between
    two compressions, by the prompt's budget; None before the prompt's end.
    """

    def __init__(self, method: CacheMethod | None) -> None:
        self.method = method
        self.length = 0
        self.interval: int | None = None
        self.segments: list[Segment] = []
        self._keys: Tensor | None = None  # (H, capacity, D), and the positions (capacity,)
        self._values: Tensor | None = None
        self._positions: Tensor | None = None
        self._dense = 0  # committed tokens among the dense ones
        self._waiting = 0
        self._ends: Tensor | None = None  # (capacity,) bool, if the method reads which tokens end a sentence
        self._queries: Tensor | None = None  # of the last committed tokens
        self._query_ends: Tensor | None = None  # which of these tokens end a sentence
        self._attention: Tensor | None = None
        # Queries of the last committed tokens, and their denominators, whose attention is not in the sums yet.
        self._unsummed: list[tuple[Tensor, Tensor]] = []
        # Queries of the waiting nodes, and the logarithms of their softmax denominators.
        self._asked: list[tuple[Tensor, Tensor]] = []
        self._scoring = PLAIN
        self._memory: Any = None
        self._lookahead: Lookahead | None = None
        # The segments, as the kernel for one token reads them; None where it does not.
        self._prepared: tuple[list[Segment], Prepared | None] | None = None

    @property
    def tokens(self) -> int:
        """Committed tokens that are held."""
        return sum(segment.tokens for segment in self.segments) + self._dense

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held, including room for tokens to come."""
        own = (self._keys, self._values, self._positions, self._queries, self._attention, self._memory)
        yield from (tensor for tensor in (*own, self._ends, self._query_ends) if isinstance(tensor, Tensor))
        yield from (part for pair in (*self._asked, *self._unsummed) for part in pair)
        for segment in self.segments:
            yield from segment.tensors()
        if self._prepared is not None and self._prepared[1] is not None:
            yield from self._prepared[1].tensors()

    @property
    def device(self) -> torch.device:
        """Where the keys and values are, of a sequence that has some."""
        assert self._keys is not None
        return self._keys.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return storage_bytes(self.tensors())

    def append(
        self,
        new: NewTokens,
        scoring: Scoring,
        sinks: Tensor | None,
        dtype: torch.dtype,
        known: Mapping[int, Partial] | None = None,
    ) -> Tensor:
        """Add waiting tokens; returns their attention output (N, H * G, D).

        sinks: (H * G,) logits of the layer, or None. known: partial results of segments that other sequences hold, too,
        by id of the segment.
        """
        self._scoring = scoring
        first, count = self._waiting, new.keys.shape[1]
        self._write(new)
        outputs = []
        for begin in range(0, count, QUERIES_AT_ONCE):
            part = slice(begin, min(count, begin + QUERIES_AT_ONCE))
            above = None if new.above is None else new.above[part]
            own = {key: Partial(*(tensor[part] for tensor in partial)) for key, partial in (known or {}).items()}
            queries, positions = new.queries[part], new.positions[part]
            outputs.append(self._attend(queries, positions, first + begin, above, scoring, sinks, own))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)

    def attend_token(self, qkv: Tensor, turns: Tensor, turned: int, position: int, scoring: Scoring) -> Tensor | None:
        """Add one waiting token behind the committed ones; returns its attention output (H * G * D,).

        None where no kernel does this in one call, and then nothing was added. qkv, turns, turned: see segmented_token.
        """
        segments = self._operands()
        if segments is None or self._waiting or (scoring.window is not None and position >= scoring.window):
            return None
        assert self._keys is not None
        assert self._values is not None
        self._reserve(self._dense + 1, self._keys, self._values)
        assert self._positions is not None
        scale = qkv.shape[1] ** -0.5 if scoring.scale is None else scoring.scale
        written, place = (self._keys, self._values, self._positions), self._dense
        output, queries, denominators = segmented_token(
            qkv, turns, turned, *written, position, place, segments, scale, scoring.soft_cap
        )
        self._scoring = scoring
        self._waiting = 1
        if self.method is not None and (self.method.query_window or self.method.sums_attention):
            self._asked.append((queries[None], denominators[None]))
        return output

    def _operands(self) -> Prepared | None:
        """The segments for the kernel; None where it does not read them, or the method reads more than it gives."""
        if self._keys is None or self._ends is not None or (self.method is not None and self.method.guided):
            return None
        if self._prepared is None or self._prepared[0] is not self.segments:
            operands: list[Operands] = []
            for segment in self.segments:
                own = segment.operands()
                if own is None:
                    break
                operands.append(own)
            known = len(operands) == len(self.segments) and reads(operands, self._keys)
            self._prepared = self.segments, prepare(operands) if known else None
        return self._prepared[1]

    def fill(self, new: NewTokens) -> None:
        """Commit tokens without attending to them, which measurements of speed do; their summed attention is 0."""
        self._write(new)
        if self.method is not None and self.method.query_window:
            self._queries = new.queries[-self.method.query_window :].clone()
        self.commit()
        if self.method is not None and self.method.sums_attention:
            self._attention = torch.zeros(len(new.keys), self._dense, device=new.keys.device)

    def _write(self, new: NewTokens) -> None:
        start, count = self._dense + self._waiting, new.keys.shape[1]
        self._reserve(start + count, new.keys, new.values)
        assert self._keys is not None
        assert self._values is not None
        assert self._positions is not None
        self._keys[:, start : start + count] = new.keys
        self._values[:, start : start + count] = new.values
        self._positions[start : start + count] = new.positions
        if self._ends is not None:
            self._ends[start : start + count] = False if new.ends is None else new.ends
        self._waiting += count

    def _attend(
        self,
        queries: Tensor,
        positions: Tensor,
        node: int,
        above: Tensor | None,
        scoring: Scoring,
        sinks: Tensor | None,
        known: Mapping[int, Partial],
    ) -> Tensor:
        """Output (W, H * G, D) of W waiting nodes, the first of which is `node`. known: see append."""
        assert self._keys is not None
        assert self._values is not None
        assert self._positions is not None
        segments = self.segments
        if segments and self.method is not None and self.method.guided:
            guides = self._guides(self.method, queries, node, above)
            segments = [segment.asked(guides) for segment in segments]
        partials = [
            known[id(segment)] if id(segment) in known else segment.attend(queries, positions, scoring)
            for segment in segments
        ]
        # Nodes behind the last of these queries are not read.
        end = self._dense + node + len(queries) if above is None else self._dense + self._waiting
        partials.append(self._attend_nodes(queries, positions, node, above, end, scoring))
        output, denominators = merged_attention(partials, sinks)
        if self.method is not None and (self.method.query_window or self.method.sums_attention):
            self._asked.append((queries.clone(), denominators))
        return output

    def _guides(self, method: CacheMethod, queries: Tensor, node: int, above: Tensor | None) -> Tensor:
        """What W waiting nodes, the first of which is `node`, retrieve by: (W, H * G, D)."""
        committed = queries[:0] if self._queries is None else self._queries
        rows = torch.cat([committed, *(waiting for waiting, _ in self._asked), queries])
        first, width, count = len(committed), len(queries), len(rows)
        seen = torch.ones(width, count, dtype=torch.bool, device=queries.device)
        if above is None:
            seen = seen.tril(first + node)
        else:
            seen[:, first:] = above[:, : count - first]
        # As many as without a tree, where the earlier ones of the window are forgotten.
        seen &= seen.flip(1).cumsum(1).flip(1) <= method.query_window
        ends = None
        if self._ends is not None:
            known = self._ends[:0] if self._query_ends is None else self._query_ends
            ends = torch.cat([known, self._ends[self._dense : self._dense + count - first]])
        return method.guide(rows, seen, ends)

    def _attend_nodes(
        self, queries: Tensor, positions: Tensor, node: int, above: Tensor | None, end: int, scoring: Scoring
    ) -> Partial:
        """Partial result over the dense committed tokens and the waiting nodes."""
        assert self._keys is not None
        assert self._values is not None
        assert self._positions is not None
        first = 0
        if scoring.window is not None:
            # Dense tokens are in the order of their positions: the first ones are behind the windows of all queries.
            first = int((self._positions[: self._dense] <= positions.min() - scoring.window).sum())
        keys, values, held = (self._keys[:, first:end], self._values[:, first:end], self._positions[first:end])
        if above is None and len(queries) == 1:
            return partial_attention(queries, keys, values, scoring)
        seen = torch.ones(len(queries), end - first, dtype=torch.bool, device=keys.device)
        if above is None:
            # A chain: query i sees all nodes up to its own.
            seen = seen.tril(self._dense - first + node)
        else:
            seen[:, self._dense - first :] = above
        if scoring.window is not None:
            seen &= positions[:, None] - held < scoring.window
        return partial_attention(queries, keys, values, scoring, None if bool(seen.all()) else seen)

    def commit(self, path: Sequence[int] | None = None) -> None:
        """Keep the waiting nodes of a path, in its order, and drop the others; None keeps all."""
        kept = list(range(self._waiting)) if path is None else list(path)
        if self._keys is not None and kept != list(range(len(kept))):
            for held, axis in ((self._keys, 1), (self._values, 1), (self._positions, 0), (self._ends, 0)):
                if held is None:
                    continue
                sources = torch.tensor([self._dense + index for index in kept], device=held.device)
                held.narrow(axis, self._dense, len(kept)).copy_(held.index_select(axis, sources))
        if self._asked:
            self._observe(kept)
        self._dense += len(kept)
        self.length += len(kept)
        self._waiting = 0
        self._asked = []
        self._sum_attention(_SUMMED_AT_ONCE)

    def _observe(self, kept: Sequence[int]) -> None:
        """Remember the queries of committed nodes."""
        assert self.method is not None
        queries, denominators = (torch.cat(parts)[list(kept)] for parts in zip(*self._asked, strict=True))
        window = self.method.query_window
        if window:
            before = queries[:0] if self._queries is None else self._queries
            self._queries = torch.cat([before, queries])[-window:].clone()
            if self._ends is not None:
                known = self._ends[:0] if self._query_ends is None else self._query_ends
                new = self._ends[self._dense : self._dense + len(kept)]
                self._query_ends = torch.cat([known, new])[-window:].clone()
        if self.method.sums_attention and kept:
            self._unsummed.append((queries, denominators))

    def _sum_attention(self, least: int) -> None:
        """Add the attention of the queries that wait for it, in lots, until fewer than `least` wait.

        Lots are counted from the last compression on, so that the sums do not depend on the passes.
        """
        waiting = sum(len(queries) for queries, _ in self._unsummed)
        if waiting < least:
            return
        assert self._keys is not None
        assert self._positions is not None
        queries, denominators = (torch.cat(parts) for parts in zip(*self._unsummed, strict=True))
        own = self._positions[: self._dense]
        parts = [segment.dense() for segment in self.segments]
        held = [(keys, positions) for keys, _, positions in parts]
        held.append((self._keys[:, : self._dense], own.expand(len(self._keys), -1)))
        sums = torch.zeros(len(self._keys), sum(keys.shape[1] for keys, _ in held), device=self._keys.device)
        if self._attention is not None:
            sums[:, : self._attention.shape[1]] = self._attention
        # The queries' own tokens are the last dense ones, of which each sees those up to its own.
        index, summed = torch.arange(waiting, device=sums.device), 0
        while waiting - summed >= least:
            some = slice(summed, min(waiting, summed + _SUMMED_AT_ONCE))
            hidden = index > index[some, None]
            asking = own[self._dense - waiting :][some]
            end = 0
            for keys, positions in held:
                shares = attention_shares(queries[some], keys, self._scoring, denominators[some])  # (H, G, W, T)
                if keys is held[-1][0]:
                    shares[..., self._dense - waiting :].masked_fill_(hidden, 0.0)
                if self._scoring.window is not None:
                    distance = asking[:, None] - positions[:, None]  # (H, W, T)
                    shares.masked_fill_((distance >= self._scoring.window)[:, None], 0.0)
                sums[:, end : end + keys.shape[1]] += shares.sum((1, 2))
                end += keys.shape[1]
            summed = some.stop
        self._attention = sums
        self._unsummed = [(queries[summed:].clone(), denominators[summed:].clone())] if summed < waiting else []

    def look_ahead(self, positions: Tensor) -> None:
        """Drop the waiting nodes at positions (W,); the method sees their queries when it is applied next."""
        queries, denominators = (torch.cat(parts) for parts in zip(*self._asked, strict=True))
        self._lookahead = Lookahead(queries, positions, denominators)
        self.commit([])

    def begin_with(self, segments: Sequence[Segment]) -> None:
        """Hold segments of another sequence, of which these are the first tokens. This one must be empty."""
        assert self.length == 0
        self.segments, self.length = list(segments), sum(segment.tokens for segment in segments)

    def uncompressed(self) -> Recent | None:
        """The dense committed tokens, for the method; None before the first token. No node may wait."""
        assert self._waiting == 0
        if self._keys is None or self._values is None or self._positions is None:
            return None
        self._sum_attention(1)
        dense = slice(0, self._dense)
        return Recent(
            self._keys[:, dense],
            self._values[:, dense],
            self._positions[dense],
            self._queries,
            self._attention,
            self._memory,
            self._lookahead,
            None if self._ends is None else self._ends[dense],
        )

    def keep(self, kept: Kept | None) -> None:
        """Hold what a method keeps; None leaves everything as it is."""
        self._lookahead = None
        if kept is None:
            return
        assert self._keys is not None
        assert self._values is not None
        assert self._positions is not None
        self.segments, self._memory, self._prepared = list(kept.segments), kept.memory, None
        if self.method is not None and self.method.forgets_queries:
            self._queries = self._query_ends = None
        if kept.kept is not None and self._attention is not None:
            self._attention = self._attention.gather(1, kept.kept)
        newest = slice(self._dense - kept.recent, self._dense)
        # Copied, so that what is not kept is freed.
        self._keys, self._values = (part[:, newest].clone() for part in (self._keys, self._values))
        self._positions = self._positions[newest].clone()
        self._ends = None if self._ends is None else self._ends[newest].clone()
        self._dense = kept.recent

    def crop(self, count: int) -> None:
        """Drop the last `count` committed tokens, which must be dense still; ValueError where they are not."""
        if count > self._dense or self._waiting:
            raise ValueError(f"{count} tokens cannot be taken back: {self._dense} of the cache are not compressed yet")
        self._dense -= count
        self.length -= count
        for name in ("_queries", "_query_ends"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else part[: max(0, len(part) - count)].clone())
        if self._unsummed:
            queries, denominators = (torch.cat(parts) for parts in zip(*self._unsummed, strict=True))
            left = max(0, len(queries) - count)
            self._unsummed = [(queries[:left].clone(), denominators[:left].clone())] if left else []
        if self._attention is not None:
            total = sum(segment.dense()[0].shape[1] for segment in self.segments) + self._dense
            self._attention = self._attention[:, :total].clone()

    def copy(self) -> "SequenceCache":
        """A cache that shares the segments, which never change."""
        other = SequenceCache(self.method)
        vars(other).update(vars(self))
        other.segments, other._asked, other._prepared = list(self.segments), list(self._asked), None
        other._unsummed = list(self._unsummed)
        for name in ("_keys", "_values", "_positions", "_ends"):
            part = getattr(self, name)
            setattr(other, name, None if part is None else part.clone())
        return other

    def _reserve(self, count: int, keys: Tensor, values: Tensor) -> None:
        """Make room for `count` dense tokens, of the shapes and dtype of keys and values (H, T, D)."""
        capacity = 0 if self._keys is None else self._keys.shape[1]
        if count <= capacity:
            return
        frees = self.method is not None and self.method.frees
        growth, least = (_GROWTH_OF_FREED, _LEAST_OF_FREED) if frees else (_GROWTH, _LEAST)
        size = max(count, capacity + max(least, int(growth * capacity)))
        for name, part in (("_keys", keys), ("_values", values)):
            held = getattr(self, name)
            grown = part.new_zeros(len(part), size, part.shape[2])
            if held is not None:
                grown[:, : held.shape[1]] = held
            setattr(self, name, grown)
        positions = torch.zeros(size, dtype=torch.int32, device=keys.device)
        if self._positions is not None:
            positions[: len(self._positions)] = self._positions
        self._positions = positions
        if self.method is not None and self.method.reads_ends:
            ends = torch.zeros(size, dtype=torch.bool, device=keys.device)
            if self._ends is not None:
                ends[: len(self._ends)] = self._ends
            self._ends = ends
