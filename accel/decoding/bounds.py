"""Memory bound of decoding: the largest tree and batch whose KV caches and logits fit into a number of bytes.

Source: SpecMemo, Yildirim and Chen 2025, arXiv:2506.01206: the memory of a step grows with the tree, and a smaller tree
costs little speed.
"""

from dataclasses import dataclass

from hasten.accel.decoding.targets.base import Target
from hasten.accel.errors import UserError

# The logits, their float32 copy, and the probabilities that verification computes from them.
_COPIES_OF_LOGITS = 3


@dataclass(frozen=True)
class Bound:
    """Limits that were chosen: `in_flight` sequences with trees of `max_nodes` nodes take at most `bytes`."""

    in_flight: int
    max_nodes: int
    bytes: int


def needed_bytes(target: Target, in_flight: int, longest: int, max_nodes: int) -> int:
    """Bytes of the caches and logits of `in_flight` sequences of up to `longest` tokens with trees of max_nodes nodes.

    The weights are not counted.
    """
    cache = (longest + max_nodes + 1) * target.token_bytes
    logits = (max_nodes + 1) * target.vocabulary * 4 * _COPIES_OF_LOGITS
    return in_flight * (cache + logits)


def fit_to_memory(target: Target, in_flight: int, longest: int, max_nodes: int, memory_bytes: int | None) -> Bound:
    """The largest tree, then the most sequences, that fit into memory_bytes; None sets no bound.

    Raises UserError if plain decoding of one sequence does not fit.
    """
    unbounded = Bound(in_flight, max_nodes, needed_bytes(target, in_flight, longest, max_nodes))
    if memory_bytes is None:
        return unbounded
    # The tree shrinks first, down to a few nodes, because its first nodes are accepted most often. Then the batch does.
    small_tree = min(max_nodes, 4)
    for count, nodes in (
        *((in_flight, nodes) for nodes in range(max_nodes, small_tree - 1, -1)),
        *((count, small_tree) for count in range(in_flight, 0, -1)),
        *((1, nodes) for nodes in range(small_tree, -1, -1)),
    ):
        needed = needed_bytes(target, count, longest, nodes)
        if needed <= memory_bytes:
            return Bound(count, nodes, needed)
    raise UserError(
        f"memory_bytes={memory_bytes} is too little: one sequence of {longest} tokens needs "
        f"{needed_bytes(target, 1, longest, 0)} bytes"
    )
