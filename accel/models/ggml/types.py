"""ggml's block types by name and by number, and the types that stand in for K-quants in narrow matrices."""

from hasten.accel.models.ggml.base import BlockType
from hasten.accel.models.ggml.k_quants import Q2K, Q3K, Q4K, Q5K, Q6K
from hasten.accel.models.ggml.legacy import Q4One, Q4Zero, Q5One, Q5Zero, Q8Zero

_ALL: tuple[type[BlockType], ...] = (Q2K, Q3K, Q4K, Q5K, Q6K, Q4Zero, Q4One, Q5Zero, Q5One, Q8Zero)
TYPES = {kind.name: kind for kind in _ALL}
NUMBERS = {kind.number: kind for kind in _ALL}
# Types of blocks of 32 columns that llama.cpp takes where 256 do not divide a matrix's columns; for the two smallest
# it has a type with a fixed table of values, of the size of q4_0.
_INSTEAD: dict[str, type[BlockType]] = {"q2_k": Q4Zero, "q3_k": Q4Zero, "q4_k": Q5Zero, "q5_k": Q5One, "q6_k": Q8Zero}


def type_for(kind: type[BlockType], columns: int) -> type[BlockType] | None:
    """The type that a matrix with this many columns gets in place of a type; None where none divides them."""
    if columns % kind.columns == 0:
        return kind
    instead = _INSTEAD.get(kind.name)
    return None if instead is None or columns % instead.columns else instead
