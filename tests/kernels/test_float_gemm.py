"""Weights of small floats: the layouts are compressed-tensors', and shapes of scales are checked."""

import pytest
import torch

from hasten.kernels.float_gemm import float_gemm
from hasten.kernels.float_gemm.layout import FloatWeight, pack_e2m1, unpack_e2m1
from hasten.kernels.float_gemm.reference import dequantize
from hasten.kernels.grid_rounding.reference import E2M1


def test_codes_of_four_bits_are_packed_as_compressed_tensors_packs_them():
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    values = torch.tensor(E2M1).repeat(2, 2) * torch.tensor([1.0, -1.0]).repeat_interleave(8)
    assert torch.equal(pack_e2m1(values), pack_fp4_to_uint8(values))
    assert torch.equal(unpack_e2m1(pack_e2m1(values)), values)


@pytest.mark.parametrize(
    ("bits", "group", "name"), [(4, 16, "NVFP4PackedCompressor"), (4, 32, "MXFP4PackedCompressor")]
)
def test_weights_are_decompressed_as_compressed_tensors_does(bits, group, name):
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 256, (3, 32), generator=generator, dtype=torch.uint8)
    state = {"weight_packed": codes}
    if group == 16:
        state["weight_scale"] = (100 * torch.rand(3, 4, generator=generator) + 1).to(torch.float8_e4m3fn)
        state["weight_global_scale"] = torch.tensor([32.0])
        strategy = "tensor_group"
    else:
        state["weight_scale"] = torch.randint(120, 130, (3, 2), generator=generator, dtype=torch.uint8)
        strategy = "group"
    weights = QuantizationArgs(num_bits=bits, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = getattr(compressors, name).decompress(state, scheme)["weight"]
    ours = dequantize(FloatWeight(codes, state["weight_scale"], state.get("weight_global_scale")))
    # Theirs is bfloat16.
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=0)


def test_a_block_of_128_by_128_shares_a_scale():
    codes = torch.ones(130, 129).to(torch.float8_e4m3fn)
    weight = FloatWeight(codes, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    product = float_gemm(torch.ones(1, 129), weight)
    assert product[0, [0, 127, 128, 129]].tolist() == [130.0, 130.0, 388.0, 388.0]


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"accepted shapes are \(1, 1\), \(4, 1\), \(1, 2\)"):
        FloatWeight(torch.zeros(4, 200).to(torch.float8_e4m3fn), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"accepted shapes are \(4, 4\)"):
        FloatWeight(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2).to(torch.float8_e4m3fn), torch.ones(1))
    with pytest.raises(ValueError, match="80 columns of 4-bit codes must be a multiple of the group of 32"):
        FloatWeight(torch.zeros(4, 40, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes are torch\.int32"):
        FloatWeight(torch.zeros(4, 32, dtype=torch.int32), torch.ones(4, 1))
