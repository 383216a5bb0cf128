import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from hasten.accel.compression.quantizers.block_grid import find_block_grid, round_to_blocks
from hasten.accel.models.ggml.base import pack_bits, unpack_bits
from hasten.accel.models.ggml.types import NUMBERS, TYPES, type_for

KINDS = list(TYPES.values())


def blocks_of(kind, rows=5, blocks=3):
    """Random bytes, with finite float16 scales."""
    stored = np.random.default_rng(0).integers(0, 256, (rows * blocks, kind.nbytes), dtype=np.uint8)
    scales = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}.get(kind.name, (0, 2))
    for at in scales[: 1 if kind.middle is not None else 2]:
        # The exponent of float16 is in the upper bits of the second byte: not all of them are set.
        stored[:, at + 1] &= 0xBB
    return torch.from_numpy(stored.reshape(rows, -1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_dequantized_to_the_bits_of_the_package(kind):
    stored = blocks_of(kind)
    expected = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType(kind.number))
    assert np.isfinite(expected).all()
    assert np.array_equal(kind.dequantize(stored).numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decoded_blocks_are_encoded_to_the_same_bytes(kind):
    stored = blocks_of(kind)
    codes, grid = kind.decode(stored)
    assert codes.max() <= kind.top()
    assert torch.equal(kind.encode(codes, grid), stored)


def test_sizes_and_names_are_those_of_ggml():
    for kind in KINDS:
        number = GGMLQuantizationType(kind.number)
        assert (number.name.lower(), gguf.GGML_QUANT_SIZES[number]) == (kind.name, (kind.columns, kind.nbytes))
        assert NUMBERS[kind.number] is kind
    bits = {kind.name: 8 * kind.nbytes / kind.columns for kind in KINDS}
    assert bits["q2_k"] == 2.625
    assert [bits[f"q{width}_k"] for width in (3, 4, 5, 6)] == [3.4375, 4.5, 5.5, 6.5625]
    assert [bits[name] for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")] == [4.5, 5.0, 5.5, 6.0, 8.5]


def test_narrow_matrices_get_the_types_that_llama_cpp_takes():
    assert [type_for(TYPES[name], 512).name for name in ("q2_k", "q6_k")] == ["q2_k", "q6_k"]
    names = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
    narrow = [type_for(TYPES[name], 576).name for name in names]
    assert narrow == ["q4_0", "q4_0", "q5_0", "q5_1", "q8_0", "q8_0"]
    assert type_for(TYPES["q4_k"], 40) is None
    assert type_for(TYPES["q8_0"], 40) is None


def test_a_byte_holds_the_codes_of_columns_that_are_a_width_apart():
    codes = torch.arange(8, dtype=torch.uint8)[None] % 4
    packed = pack_bits(codes, 2, 2)
    # Columns 0, 2, 4 and 6 hold 0, 2, 0 and 2: the first is in the lowest bits.
    assert packed.tolist() == [[0b10_00_10_00, 0b11_01_11_01]]
    assert torch.equal(unpack_bits(packed, 2, 2), codes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_on_a_grid_are_stored_exactly(kind):
    codes = torch.randint(0, kind.top() + 1, (4, 2 * kind.columns), generator=torch.Generator().manual_seed(0))
    _, grid = kind.decode(blocks_of(kind, 4, 2))
    stored = kind.encode(codes.to(torch.uint8), grid)
    weight = kind.dequantize(stored)
    again = kind.dequantize(kind.encode(round_to_blocks(weight, kind, grid), grid))
    torch.testing.assert_close(again, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_searched_scales_lose_less_than_those_of_the_package(name):
    kind, weight = TYPES[name], torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    grid = find_block_grid(weight, kind)
    error = (kind.dequantize(kind.encode(round_to_blocks(weight, kind, grid), grid)) - weight).square().sum()
    number = GGMLQuantizationType(kind.number)
    package = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    assert error < 0.99 * (torch.from_numpy(package) - weight).square().sum()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_columns_of_important_inputs_lose_less(kind):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(256)
    importance[::7] = 100.0
    errors = []
    for given in (None, importance):
        grid = find_block_grid(weight, kind, given)
        error = kind.dequantize(kind.encode(round_to_blocks(weight, kind, grid), grid)) - weight
        errors.append(float((error.square() * importance).sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_zeros_constants_and_huge_weights_stay_finite(kind):
    weight = torch.zeros(4, 256)
    weight[1], weight[2], weight[3] = 0.25, -0.25, 1e9
    grid = find_block_grid(weight, kind)
    stored = kind.dequantize(kind.encode(round_to_blocks(weight, kind, grid), grid))
    assert stored.isfinite().all()
    assert torch.equal(stored[0], weight[0])
    torch.testing.assert_close(stored[1:3], weight[1:3], rtol=0.02, atol=0)
