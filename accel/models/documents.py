"""Documents that share a sequence, and whose attention is kept apart; see data/packing.py.

Positions begin anew with each document. From them transformers itself makes masks, in which a position sees only those
before it in its own document. A block that mixes positions without such a mask is refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError
from hasten.accel.models.skeleton import Call

# Name of the attribute by which hidden states carry the documents of their positions from block to block.
_ATTRIBUTE = "hasten_documents"


def mark(hidden: Tensor, documents: Tensor | None) -> Tensor:
    """The hidden states (B, T, D), with the document numbers (B, T) of their positions; None for one document each."""
    if documents is not None:
        setattr(hidden, _ATTRIBUTE, documents)
    return hidden


def documents_of(hidden: Tensor) -> Tensor | None:
    """The document numbers (B, T) that hidden states were marked with."""
    return getattr(hidden, _ATTRIBUTE, None)


def positions_of(documents: Tensor) -> Tensor:
    """Positions (B, T) in their documents, for document numbers (B, T)."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff(dim=1) != 0
    first: Tensor = torch.where(begins, place, 0).cummax(1).values
    return place - first


def check_masks(blocks: Sequence[nn.Module], calls: Sequence[Call], documents: Tensor, model: object) -> None:
    """UserError where a block does not keep documents (B, T) apart. calls: of the blocks. model: the model's path."""
    borders = (documents.diff(dim=1) != 0).nonzero()
    if not len(borders):
        return
    sequence, before = borders[0].tolist()
    length = documents.shape[1]
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        masks = [
            value
            for value in (*call.positional, *call.named.values())
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == (length, length)
        ]
        is_cut = masks and all(_hides(mask, sequence, before + 1, before) for mask in masks)
        # Convolutions over positions belong to linear attention and state spaces, which no mask cuts.
        if not is_cut or any(isinstance(module, nn.Conv1d) for module in block.modules()):
            raise UserError(
                f"calibration.packing=documents: block {number} of {model} mixes positions without an attention mask "
                "that keeps documents apart: use calibration.packing=stream"
            )


def _hides(mask: Tensor, sequence: int, query: int, key: int) -> bool:
    """Whether a mask (B, H, T, T) hides a key from a query: False, or a number that no score outweighs."""
    value = mask[sequence if len(mask) > 1 else 0, 0, query, key]
    return not bool(value) if mask.dtype == torch.bool else float(value) < -1e4
