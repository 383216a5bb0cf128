"""Packed weights: the layout is compressed-tensors', and a code at its zero point is zero."""

import pytest
import torch

from hasten.kernels.packed_gemm import packed_gemm
from hasten.kernels.packed_gemm.reference import dequantize
from hasten.kernels.packed_weight import BITS, PackedWeight, pack_codes, unpack_codes


@pytest.mark.parametrize("columns", [32, 40, 65])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_compressed_tensors_packs_them(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_codes(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, columns), codes.to(torch.uint8))
    # However the codes lie in memory.
    assert torch.equal(pack_codes(codes.T.contiguous().T, bits), pack_codes(codes, bits))


def test_groups_of_permuted_columns_take_the_scale_of_their_index():
    codes = torch.tensor([[3, 1, 3, 1]])
    weight = PackedWeight(
        pack_codes(codes, 2), torch.tensor([[1.0, 10.0]]), 4, 2, None, torch.tensor([1, 0, 0, 1]).int()
    )
    assert dequantize(weight).tolist() == [[10.0, -1.0, 1.0, -10.0]]
    assert packed_gemm(torch.ones(1, 4), weight).item() == 0.0


def test_codes_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"3 words a row, got torch\.int32 with 2"):
        PackedWeight(torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 1), 32, 3)
    with pytest.raises(ValueError, match="bits=5 is not supported: use one of 2, 3, 4, 8"):
        PackedWeight(torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, 1), 32, 5)


def test_scales_zero_points_and_groups_of_another_shape_are_refused():
    codes, scale = torch.zeros(2, 8, dtype=torch.int32), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"scale must be \(2, groups\), got \(1, 4\)"):
        PackedWeight(codes, scale[:1], 64, 4)
    with pytest.raises(ValueError, match=r"zero_point must be uint8 \(2, 4\), got torch\.int32 \(2, 1\)"):
        PackedWeight(codes, scale, 64, 4, torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"group_index must be int32 \(64,\), got torch\.int64 \(64,\)"):
        PackedWeight(codes, scale, 64, 4, None, torch.zeros(64, dtype=torch.int64))
