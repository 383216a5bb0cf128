"""Memory bound of decoding: the largest tree and batch whose KV caches and logits fit into a number of bytes.

Source: SpecMemo, Yildirim and Chen 2025, arXiv:2506.01206: the memory of a step grows with the tree, and a smaller tree
costs little speed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hasten.accel.decoding.targets.base import COPIES_OF_LOGITS, Target
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Bound:
    """Limits that were chosen: `in_flight` sequences with trees of `max_nodes` nodes."""

    in_flight: int
    max_nodes: int


def needed_bytes(target: Target, in_flight: int, longest: int, max_nodes: int) -> int:
    """Bytes of the target's caches and logits of `in_flight` sequences of up to `longest` tokens.

    max_nodes: nodes of a tree. The weights are not counted.
    """
    cache = (longest + max_nodes + 1) * target.token_bytes
    logits = (max_nodes + 1) * target.vocabulary * 4 * COPIES_OF_LOGITS
    return in_flight * (cache + logits)


def fit_to_memory(
    needed: Callable[[int, int], int], in_flight: int, max_nodes: int, memory_bytes: int | None, longest: int
) -> Bound:
    """The largest tree, then the most sequences, that fit into memory_bytes; None sets no bound.

    needed: bytes of all caches and logits by the number of sequences and of nodes of a tree. longest: tokens of the
    longest sequence, for the message. Raises UserError if plain decoding of one sequence does not fit.
    """
    if memory_bytes is None:
        return Bound(in_flight, max_nodes)
    # The tree shrinks first, down to a few nodes, because its first nodes are accepted most often. Then the batch does.
    small_tree = min(max_nodes, 4)
    for count, nodes in (
        *((in_flight, nodes) for nodes in range(max_nodes, small_tree - 1, -1)),
        *((count, small_tree) for count in range(in_flight, 0, -1)),
        *((1, nodes) for nodes in range(small_tree, -1, -1)),
    ):
        if needed(count, nodes) <= memory_bytes:
            return Bound(count, nodes)
    raise UserError(
        f"memory_bytes={memory_bytes} is too little: one sequence of {longest} tokens needs {needed(1, 0)} bytes"
    )
