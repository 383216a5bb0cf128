"""Vectors in fewer than two bits a number: signs of a spectrum beside channels in two bits, and trits.

Source: Tao et al. 2025, arXiv:2503.16257 (VidKV). All numbers along the tokens of a group share a scale, of 16 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.pair import by_head
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize

# 3**5 = 243 values fit a byte.
_TRITS = 5
_WIDE_BITS = 2


@dataclass(frozen=True)
class SignedSpectrum:
    """Vectors (H, T, D): some channels in two bits, and of the spectrum of the others in a head a sign a number.

    wide: (H, D) bool, the channels in two bits, as many in each head. codes: of (T, H * K). signs: uint8, from the
    lowest bit on, of the flattened (T, H * N) numbers of the spectrum, N = D - K; scale: (T / group, H * N), theirs.
    """

    wide: Tensor
    codes: Packed
    signs: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, vectors: Tensor, wide: Tensor, group: int) -> "SignedSpectrum":
        """Of vectors (H, T, D), T a multiple of group; some channels of every head are wide, and some are not."""
        half = _half(vectors.dtype)
        chosen, others = (_channels(vectors, mask) for mask in (wide, ~wide))
        codes = quantize_pack(chosen.transpose(0, 1).flatten(1), _WIDE_BITS, "channel", group)
        numbers = _spectrum(others.float()).transpose(0, 1).flatten(1)
        scale = numbers.abs().unflatten(0, (-1, group)).mean(1).to(half)
        bits = torch.nn.functional.pad((numbers >= 0).flatten(), (0, -numbers.numel() % 8)).view(-1, 8)
        signs = (bits * 2 ** torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)
        return cls(wide, codes, signs, scale, vectors.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.wide, self.codes.words, self.codes.scale, self.signs, self.scale)
        if self.codes.offset is not None:
            yield self.codes.offset

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D)."""
        chosen = by_head(unpack_dequantize(self.codes).float(), heads)
        count = chosen.shape[1]
        bits = self.signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.signs.device) & 1
        signs = bits.flatten()[: count * self.scale.shape[1]].float() * 2 - 1
        numbers = signs.view(len(self.scale), -1, self.scale.shape[1]) * self.scale.float()[:, None]
        vectors = chosen.new_empty(heads, count, self.wide.shape[1])
        for mask, part in ((self.wide, chosen), (~self.wide, _signal(by_head(numbers.flatten(0, 1), heads)))):
            vectors.scatter_(2, _indices(mask)[:, None].expand(-1, count, -1), part)
        return vectors.to(self.dtype)


@dataclass(frozen=True)
class Trits:
    """Vectors (H, T, D) of -1, 0 and 1 times a scale. codes: uint8, five trits a byte. scale: (T / group, H * D)."""

    codes: Tensor
    scale: Tensor
    tokens: int
    dtype: torch.dtype

    @classmethod
    def of(cls, vectors: Tensor, group: int) -> "Trits":
        """Of vectors (H, T, D), T a multiple of group: what is below half of a group's mean magnitude is zero."""
        groups = vectors.transpose(0, 1).flatten(1).float().unflatten(0, (-1, group))
        sizes = groups.abs()
        large = sizes > 0.5 * sizes.mean(1, keepdim=True)
        # The mean of those that are not zero has the least squared error.
        scale = ((sizes * large).sum(1) / large.sum(1).clamp(min=1)).to(_half(vectors.dtype))
        trits = torch.where(large, groups.sign(), 0).flatten().to(torch.uint8) + 1  # -1 wraps around to 0
        rows = torch.nn.functional.pad(trits, (0, -len(trits) % _TRITS)).view(-1, _TRITS)
        powers = 3 ** torch.arange(_TRITS, device=rows.device)
        return cls((rows * powers).sum(1).to(torch.uint8), scale, vectors.shape[1], vectors.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """Codes and scales."""
        yield from (self.codes, self.scale)

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D)."""
        groups, columns = self.scale.shape
        digits = torch.arange(3**_TRITS)[:, None] // 3 ** torch.arange(_TRITS) % 3 - 1
        trits = digits.float().to(self.codes.device)[self.codes.long()].flatten()[: self.tokens * columns]
        numbers = trits.view(groups, -1, columns) * self.scale.float()[:, None]
        return by_head(numbers.flatten(0, 1), heads).to(self.dtype)


def wide_channels(vectors: Tensor, count: int) -> Tensor:
    """Which `count` channels (H, D) bool of vectors (H, T, D) have the largest range in each head; first of equals."""
    ranges = vectors.float().amax(1) - vectors.float().amin(1)
    order = ranges.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(ranges, dtype=torch.bool).scatter_(1, order, True)


def _half(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize == 2 else torch.float16


def _indices(mask: Tensor) -> Tensor:
    """Indices (H, K) of the channels of a mask (H, D) with K of them in every head."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _channels(vectors: Tensor, mask: Tensor) -> Tensor:
    return vectors.gather(2, _indices(mask)[:, None].expand(-1, vectors.shape[1], -1))


def _spectrum(signal: Tensor) -> Tensor:
    """The N different real numbers of the spectrum of real signals (..., N): half of it is the other half's mirror."""
    size = signal.shape[-1]
    spectrum = torch.fft.rfft(signal, norm="ortho")
    # The first imaginary part is zero, and with an even N the last one, too.
    return torch.cat([spectrum.real, spectrum.imag[..., 1 : size - size // 2]], -1)


def _signal(numbers: Tensor) -> Tensor:
    """The signals (..., N) of their spectrum."""
    size = numbers.shape[-1]
    real, imaginary = numbers.split([size // 2 + 1, size - size // 2 - 1], -1)
    padded = torch.nn.functional.pad(imaginary, (1, size // 2 - imaginary.shape[-1]))
    return torch.fft.irfft(torch.complex(real.contiguous(), padded), n=size, norm="ortho")
