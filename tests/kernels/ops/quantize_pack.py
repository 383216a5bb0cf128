"""Quantization to packed words, and back."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hasten.kernels.packed_weight import unpack_codes
from hasten.kernels.quantize_pack import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned

# Rows, columns, axis, group size.
SIZES = [(3, 80, "token", 80), (17, 64, "token", 32), (36, 40, "channel", 18), (4, 33, "channel", 4)]
LONG_SIZES = [(1000, 1024, "token", 128), (4096, 128, "channel", 64), (4096, 1024, "channel", 4096)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for size in SIZES if device == "cpu" else SIZES + LONG_SIZES:
        for bits in (2, 3, 4, 8):
            for dtype in DTYPES:
                # In the interpreter each width and size is checked in one of two types.
                wanted = DTYPES[(bits + size[0]) % 2]
                if device != "cpu" or dtype == wanted:
                    yield f"{size} {bits} {dtype}", partial(check, size, bits, dtype, bits == 4, device)
    yield "no rows", partial(check_no_rows, device)
    yield "extremes", partial(check_extremes, device)


def compilations() -> list[Compilation]:
    """Values of 3 bits, whose codes cross words; keys of 4 bits; and the way back."""
    types = {"x": "*bf16", "words": "*i32", "scale": "*fp16", "offset": "*fp16", "rows": "i32", "columns": "i32"}
    types |= dict.fromkeys(["group_size", "x_stride", "words_stride", "scale_stride"], "i32")
    types |= {"least": "fp32", "largest": "fp32"}
    types |= dict.fromkeys(["BITS", "BY_CHANNEL", "ROWS"], "constexpr")
    back = {"words": "*i32", "scale": "*fp16", "offset": "*fp16", "out": "*bf16", "rows": "i32", "columns": "i32"}
    back |= dict.fromkeys(["group_size", "words_stride", "scale_stride"], "i32")
    back |= dict.fromkeys(["BITS", "BY_CHANNEL", "ROWS", "COLUMNS"], "constexpr")
    kernel = triton_kernel.quantizing_kernel
    keys = {"BITS": 4, "BY_CHANNEL": True, "ROWS": 16, "offset": None}
    return [
        Compilation("values", kernel, types, {"BITS": 3, "BY_CHANNEL": False, "ROWS": 16}),
        Compilation("keys", kernel, types | {"offset": "constexpr"}, keys, targets=("sm_90", "gfx942")),
        Compilation(
            "back", triton_kernel.unpacking_kernel, back, {"BITS": 3, "BY_CHANNEL": False, "ROWS": 8, "COLUMNS": 128}
        ),
    ]


def check(size: tuple[int, int, str, int], bits: int, dtype: torch.dtype, symmetric: bool, device: str) -> None:
    """AssertionError where codes are not a right rounding, or where they do not come back as the reference's values."""
    rows, columns, axis, group_size = size
    generator = torch.Generator().manual_seed(bits)
    x = (2 + torch.randn(rows, columns + 5, generator=generator)).to(dtype).to(device)[:, :columns]
    x[: group_size if axis == "channel" else 1] *= 0  # groups of equal numbers
    with poisoned():
        packed = triton_kernel.quantize_pack(x, bits, axis, group_size, symmetric)
        restored = triton_kernel.unpack_dequantize(packed)
    expected = reference.quantize_pack(x.double() if dtype == torch.float32 else x, bits, axis, group_size, symmetric)
    eps = max(torch.finfo(kind).eps for kind in (dtype, reference.GRID))
    assert packed.scale.dtype == expected.scale.dtype == reference.GRID
    assert restored.dtype == packed.dtype == dtype
    # A step of float16, where float32 rounds to the other of two neighbours.
    torch.testing.assert_close(packed.scale.double(), expected.scale.double(), rtol=2**-10, atol=reference.LEAST)
    if packed.offset is not None:
        assert torch.equal(packed.offset, expected.offset)
    assert packed.words.shape == expected.words.shape
    # Half a step where the exact quotient is in the middle between two codes, and a code there.
    codes, right = (unpack_codes(each.words, bits, columns).int() for each in (packed, expected))
    differ = codes != right
    assert int((codes - right).abs().max()) <= 1
    assert float(differ.float().mean()) < 0.01
    # Unused bits at the end of a row are 0.
    assert torch.equal(packed.words, reference.pack_codes(codes, bits))
    torch.testing.assert_close(restored, reference.unpack_dequantize(packed), rtol=eps, atol=4 * eps)
    step = packed.scale.double().repeat_interleave(group_size, 0 if axis == "channel" else 1)
    # Half a step, and at the ends of the range the rounding of the scale and of the offset.
    error = (restored.double() - x.double()).abs()
    assert bool((error <= 0.501 * step + 2 * eps * (x.double().abs().amax() + 1)).all())


def check_no_rows(device: str) -> None:
    """AssertionError where no tokens are not packed to no words, and back."""
    packed = triton_kernel.quantize_pack(torch.ones(0, 64, device=device), 4, "token", 32, False)
    assert packed.words.shape == (0, 8)
    assert packed.scale.shape == (0, 2)
    assert triton_kernel.unpack_dequantize(packed).shape == (0, 64)


def check_extremes(device: str) -> None:
    """AssertionError where groups that float16 has no usual scale or offset for differ from the reference's."""
    tiny, huge = torch.tensor([[0.0], [1e-30], [-3e-7], [2.5e-5]]), torch.tensor([[7e4], [-1e6], [3e38]])
    x = (torch.cat([tiny, huge]) * torch.linspace(0.5, 1, 32)).to(device)
    for symmetric in (False, True):
        for axis, given in (("token", x), ("channel", x.T.contiguous())):
            packed = triton_kernel.quantize_pack(given, 4, axis, 32, symmetric)
            expected = reference.quantize_pack(given, 4, axis, 32, symmetric)
            assert bool((packed.scale > 0).all() & packed.scale.isfinite().all())
            for one, other in ((packed.words, expected.words), (packed.scale, expected.scale)):
                assert torch.equal(one, other)
            assert packed.offset is None or torch.equal(packed.offset, expected.offset)
            restored = triton_kernel.unpack_dequantize(packed)
            torch.testing.assert_close(restored, reference.unpack_dequantize(packed), rtol=1e-6, atol=0)
