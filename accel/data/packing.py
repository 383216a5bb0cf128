"""Several documents in one sequence, whose attention is kept apart.

Source: Krell et al. 2021, arXiv:2107.02027 (packing without cross-contamination). Departs from it: documents follow
each other in a drawn order, and the last one of a sequence is cut, so that no position is padding.

Packed sequences are a tensor (N, 2, T): token ids, and the number of the document in its sequence, ascending from 0.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A cut piece with fewer tokens says nothing of a document.
_LEAST = 2


def pack(documents: Sequence[np.ndarray], sequences: int, length: int, begin: tuple[int, ...], seed: int) -> Tensor:
    """Packed sequences (N, 2, length) of documents in an order drawn by seed; fewer than `sequences` of few documents.

    A document longer than a sequence is cut into several, each of which begins with `begin`.
    """
    pieces = [piece for document in documents for piece in _pieces(document, length, begin)]
    random.Random(seed).shuffle(pieces)
    rows: list[np.ndarray] = []
    row: list[np.ndarray] = []
    left = length
    for piece in pieces:
        if len(rows) == sequences:
            break
        row.append(piece[:left])
        left -= len(row[-1])
        if not left:
            numbers = np.repeat(np.arange(len(row)), [len(part) for part in row])
            rows.append(np.stack([np.concatenate(row), numbers]))
            row, left = [], length
    if not rows:
        return torch.empty(0, 2, length, dtype=torch.int64)
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _pieces(document: np.ndarray, length: int, begin: tuple[int, ...]) -> list[np.ndarray]:
    head = np.asarray(begin, dtype=np.int64)
    size = length - len(head)
    rest = range(length, len(document), size)
    pieces = [document[:length], *(np.concatenate([head, document[first : first + size]]) for first in rest)]
    return [piece for piece in pieces if len(piece) >= _LEAST]


def is_packed(tokens: Tensor) -> bool:
    """Whether sequences are packed ones."""
    return tokens.ndim == 3


def unpack(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) and document numbers (B, T) of sequences; None for sequences that are not packed."""
    return (tokens[:, 0], tokens[:, 1]) if is_packed(tokens) else (tokens, None)
