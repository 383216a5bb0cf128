"""VidKV: what a number costs, which channels are wide, and what one bit of a spectrum and a trit stand for."""

import pytest
import torch

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.quantize.vidkv import VidKV
from hasten.accel.cache.segments.trits import SignedSpectrum, Trits
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import PLAIN

HEADS, TOKENS, SIZE, GROUP = 2, 64, 32, 32
PLACE = Place(0, 1, TOKENS, None, PLAIN)


def recent(dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, TOKENS, SIZE, generator=generator).to(dtype) for _ in range(2))
    given = {"keys": keys, "values": values, "positions": torch.arange(TOKENS, dtype=torch.int32)}
    return Recent(**{**given, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1.25, 1.5])
def test_keys_take_their_bits_and_values_a_fifth_of_a_byte_and_scales_16_bits(dtype, bits):
    (segment,) = VidKV(residual=0, bits=bits).compress([], recent(dtype), PLACE).segments
    numbers, groups = HEADS * TOKENS * SIZE, HEADS * TOKENS // GROUP
    wide = round(SIZE * (bits - 1))
    keys, values = numbers * bits / 8, -(-numbers // 5)
    # A scale for each channel of each group, of keys and of values, and an offset for those in two bits.
    scales = 2 * groups * (2 * SIZE + wide)
    assert segment.nbytes == keys + values + scales + HEADS * SIZE + 4 * TOKENS  # which channels are wide; positions


def test_channels_of_the_largest_range_are_in_two_bits_for_good():
    given = recent()
    keys = given.keys.clone()
    keys[0, :, [3, 7]] *= 50
    keys[1, :, [0, 31]] *= 50
    method = VidKV(residual=0, bits=1 + 2 / SIZE)
    (segment,) = method.compress([], recent(keys=keys), PLACE).segments
    assert [row.nonzero()[:, 0].tolist() for row in segment.keys.wide] == [[3, 7], [0, 31]]
    found = segment.dense()[0][0, :GROUP, 3]
    assert len(found.unique()) == 4  # levels of two bits in a group
    _, later = method.compress([segment], given, PLACE).segments
    assert later.keys.wide is segment.keys.wide


@pytest.mark.parametrize("narrow", [8, 9])
def test_a_key_whose_spectrum_has_one_magnitude_at_each_frequency_is_exact(narrow):
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.rand(narrow // 2 + 1, generator=generator) + 0.5
    real, imaginary = (
        torch.where(torch.rand(1, GROUP, narrow // 2 + 1, generator=generator) < 0.5, -1.0, 1.0) * magnitudes
        for _ in range(2)
    )
    imaginary[..., 0] = 0
    if narrow % 2 == 0:
        imaginary[..., -1] = 0
    keys = torch.randn(1, GROUP, narrow + 1, generator=generator)
    keys[..., 1:] = torch.fft.irfft(torch.complex(real, imaginary), n=narrow, norm="ortho")
    wide = torch.arange(narrow + 1)[None] == 0
    found = SignedSpectrum.of(keys, wide, GROUP).dense(1)[..., 1:]
    torch.testing.assert_close(found, keys[..., 1:], rtol=0, atol=2**-9)  # scales of 16 bits


def test_a_value_is_zero_below_half_of_its_group_s_mean_magnitude_and_else_plus_or_minus_one_scale():
    values = torch.tensor([4.0, -2.0, 1.1, 0.9, -0.1, 0.5, 0.0, -1.4]).view(1, 8, 1)  # the mean magnitude is 1.25
    scale = (4 + 2 + 1.1 + 0.9 + 1.4) / 5
    found = Trits.of(values, 8).dense(1)[0, :, 0]
    torch.testing.assert_close(found, scale * torch.tensor([1.0, -1, 1, 1, 0, 0, 0, -1]), rtol=2**-10, atol=0)


def test_bits_that_keys_cannot_have_are_named():
    with pytest.raises(UserError, match=r"cache.bits=2.0 is out of range: above 1 and below 2"):
        VidKV(bits=2.0)
