"""A 2:4 sparse weight in a level database: for every four weights two values or codes, and their indices.

The indices are the metadata of NVIDIA's sparse tensor cores (arXiv:2104.08378): two bits for each kept weight, its
index in its group of four. vLLM and transformers no longer read such checkpoints, so only hasten reads this form.
"""

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Indices of mask (R, C) bool, two of every four True: (R, ceil(C / 8)) uint8.

    Four bits for every four weights, the lower index in the lower two, the first four weights in the lower half of a
    byte.
    """
    first, second = _indices(mask).unbind(-1)
    nibbles = (first | second << 2).to(torch.uint8).cpu()
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """Mask (R, C) bool from the indices of pack_mask."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, : columns // 4].long()
    indices = torch.stack([nibbles & 3, nibbles >> 2], -1)
    mask = torch.zeros(len(packed), columns // 4, 4, dtype=torch.bool)
    return mask.scatter_(-1, indices, True).flatten(1)


def kept(weight: Tensor, mask: Tensor) -> Tensor:
    """The weights (R, C / 2), by rows, that mask (R, C) keeps of weight (R, C)."""
    return weight.unflatten(1, (-1, 4)).gather(-1, _indices(mask)).flatten(1)


def spread(values: Tensor, mask: Tensor, fill: int = 0) -> Tensor:
    """Tensor (R, C) with values (R, C / 2) where mask (R, C) is True, and fill elsewhere."""
    return torch.full(mask.shape, fill, dtype=values.dtype).masked_scatter_(mask, values)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, N) uint8 packed by rows, (R, ceil(N bits / 8)) uint8, from the lowest bit of the first byte on."""
    single = np.unpackbits(codes.cpu().numpy()[..., None], axis=-1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, number: int) -> Tensor:
    """Codes (R, number) uint8 from the bytes of pack_codes."""
    single = np.unpackbits(packed.numpy(), axis=1, count=number * bits, bitorder="little")
    codes = np.packbits(single.reshape(len(packed), number, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0].copy())


def _indices(mask: Tensor) -> Tensor:
    """Indices of the two kept weights in each group of four, ascending, (R, C / 4, 2) int64."""
    return mask.unflatten(1, (-1, 4)).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2]
