"""A weight with bits that differ by column, in a level database: every code in its column's bits.

Neither servers nor transformers read bits that differ by column. So checkpoints hold such layers dense, and only hasten
reads this form.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hasten.accel.compression.quantizers.columns import MAX_WIDTH, MIN_WIDTH, ColumnWeight

# Packed at once: a multiple of 8, so that codes of any width fill whole bytes, and few enough for memory, since every
# bit takes a byte while it is packed.
_ROWS_AT_ONCE = 1024


def pack(weight: ColumnWeight) -> dict[str, Tensor]:
    """Stored tensors: for every width B `codes_B`, the codes of its columns by rows, from the lowest bit of a byte on.

    Also `widths` (ceil(C / 2),) uint8, with column 2 i in the low half of byte i; `scale` (R,); `weight_shape`.
    """
    codes, widths = weight.codes.cpu().numpy(), weight.widths.cpu().numpy()
    even = np.append(widths, np.zeros(len(widths) % 2, np.uint8))
    stored = {
        "widths": torch.from_numpy(even[0::2] | even[1::2] << 4),
        "scale": weight.scale.cpu().contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    for width in np.unique(widths).tolist():
        columns = np.flatnonzero(widths == width)
        parts = [
            np.packbits(_bits(codes[start : start + _ROWS_AT_ONCE, columns], width), bitorder="little")
            for start in range(0, len(codes), _ROWS_AT_ONCE)
        ]
        stored[f"codes_{width}"] = torch.from_numpy(np.concatenate(parts))
    return stored


def unpack(stored: Mapping[str, Tensor]) -> ColumnWeight:
    """The weight from the stored tensors of `pack`."""
    rows, columns = stored["weight_shape"].tolist()
    halves = stored["widths"].numpy()
    widths = np.stack([halves & 15, halves >> 4], axis=1).reshape(-1)[:columns]
    codes = np.empty((rows, columns), np.uint8)
    for width in range(MIN_WIDTH, MAX_WIDTH + 1):
        own = np.flatnonzero(widths == width)
        if not len(own):
            continue
        packed = stored[f"codes_{width}"].numpy()
        size = _ROWS_AT_ONCE * len(own) * width // 8
        for number, start in enumerate(range(0, rows, _ROWS_AT_ONCE)):
            stop = min(rows, start + _ROWS_AT_ONCE)
            count = (stop - start) * len(own) * width
            bits = np.unpackbits(packed[number * size : (number + 1) * size], count=count, bitorder="little")
            unpacked = np.packbits(bits.reshape(-1, width), axis=1, bitorder="little")
            codes[start:stop, own] = unpacked.reshape(stop - start, len(own))
    return ColumnWeight(torch.from_numpy(codes), torch.from_numpy(widths), stored["scale"])


def _bits(codes: np.ndarray, width: int) -> np.ndarray:
    """The lowest `width` bits of each code, one byte a bit, from the lowest bit on."""
    return np.unpackbits(codes.reshape(-1, 1), axis=1, count=width, bitorder="little")
