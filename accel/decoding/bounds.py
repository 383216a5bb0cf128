"""The largest number of bytes that decoding holds besides the weights, and the largest tree and batch that fit a bound on it.

Source: SpecMemo, Yildirim and Chen 2025, arXiv:2506.01206: the candidates of a step take memory in proportion to the
tree, and can be bought back at little cost in speed.
"""

from dataclasses import dataclass

from hasten.accel.decoding.targets.base import Target
from hasten.accel.errors import UserError

# Logits, their float32 copy, and what verification makes of them.
_COPIES_OF_LOGITS = 3


@dataclass(frozen=True)
class Bound:
    """in_flight sequences with trees of `max_nodes` nodes hold `bytes` at most."""

    in_flight: int
    max_nodes: int
    bytes: int


def held_bytes(target: Target, in_flight: int, longest: int, max_nodes: int) -> int:
    """Bytes of caches and logits of `in_flight` sequences of at most `longest` tokens, with trees of `max_nodes` nodes."""
    per_sequence = (longest + max_nodes + 1) * target.token_bytes + (
        max_nodes + 1
    ) * target.vocabulary * 4 * _COPIES_OF_LOGITS
    return in_flight * per_sequence


def bounded(target: Target, in_flight: int, longest: int, max_nodes: int, memory_bytes: int | None) -> Bound:
    """The largest tree, and after that the most sequences, that stay within memory_bytes; None is no bound.

    Raises UserError where not even plain decoding of one sequence does.
    """
    unbounded = Bound(in_flight, max_nodes, held_bytes(target, in_flight, longest, max_nodes))
    if memory_bytes is None:
        return unbounded
    # Trees shrink first, down to a few nodes: the first nodes of a tree give most. Then there are fewer sequences.
    floor = min(max_nodes, 4)
    for count, nodes in (
        *((in_flight, nodes) for nodes in range(max_nodes, floor - 1, -1)),
        *((count, floor) for count in range(in_flight, 0, -1)),
        *((1, nodes) for nodes in range(floor, -1, -1)),
    ):
        needed = held_bytes(target, count, longest, nodes)
        if needed <= memory_bytes:
            return Bound(count, nodes, needed)
    raise UserError(
        f"memory_bytes={memory_bytes} is too little: one sequence of {longest} tokens needs "
        f"{held_bytes(target, 1, longest, 0)} bytes"
    )
