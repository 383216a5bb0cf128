import pytest
import torch

from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import INTEGERS, CompressedTensors
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest


@pytest.mark.parametrize("group_size", [32, 96, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_unpacks_zero_points_of_any_number_of_rows(bits, group_size):
    for rows in range(1, 41):
        weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).bfloat16()
        quantized = RoundToNearest().quantize(weight, None, Scheme(bits, group_size)).weight
        loader, form = LoaderScheme(INTEGERS, quantized.scheme), CompressedTensors()
        packed = form.pack(quantized, loader)
        # `unpack` is the library's own decompression.
        assert torch.equal(form.unpack(packed, loader), quantized.dequantize()), f"{rows} rows"
        for tensor in form.tensors(loader, rows, 96, torch.bfloat16):
            assert packed[tensor.name].shape == tensor.shape
