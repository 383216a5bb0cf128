import pytest
import torch

from hasten.accel.compression.formats import bitmask
from hasten.accel.compression.pruners.base import PrunedWeight


def pruned(rows, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.4
    return PrunedWeight((torch.randn(rows, columns, generator=generator) * mask).to(dtype), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 131])
def test_packed_weights_unpack_bit_for_bit(columns, dtype):
    weight = pruned(12, columns, dtype)
    unpacked = bitmask.unpack(bitmask.pack(weight))
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, weight.weight)


def test_a_weight_worked_by_hand():
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    weight = torch.arange(20.0).view(2, 10) * mask
    stored = bitmask.pack(PrunedWeight(weight, mask))
    assert stored["mask"].tolist() == [[1 + 8, 2], [2 + 128, 0]]
    assert stored["values"].tolist() == [0.0, 3.0, 9.0, 11.0, 17.0]  # a kept weight that is zero is stored
    assert stored["weight_shape"].tolist() == [2, 10]


def test_the_stored_bytes_are_the_bits_that_are_counted():
    weight = pruned(16, 64, torch.bfloat16)
    stored = bitmask.pack(weight)
    assert 8 * (stored["mask"].nbytes + stored["values"].nbytes) == weight.bits


@pytest.mark.parametrize("keep", [True, False])
def test_masks_that_keep_all_or_nothing_unpack(keep):
    mask = torch.full((3, 11), keep)
    weight = PrunedWeight(torch.ones(3, 11) * mask, mask)
    assert torch.equal(bitmask.unpack(bitmask.pack(weight)), weight.weight)


def test_it_survives_a_file_read_by_memory_map(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    weight = pruned(12, 131, torch.bfloat16)
    save_file(bitmask.pack(weight), tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", framework="pt") as file:
        assert torch.equal(bitmask.unpack({name: file.get_tensor(name) for name in file.keys()}), weight.weight)  # noqa: SIM118 (no mapping)
