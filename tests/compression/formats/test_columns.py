import pytest
import torch

from hasten.accel.compression.formats import columns as form
from hasten.accel.compression.quantizers.columns import ColumnWeight


def weight(rows, columns, dtype=torch.bfloat16, highest=8):
    generator = torch.Generator().manual_seed(0)
    widths = torch.randint(1, highest + 1, (columns,), generator=generator, dtype=torch.uint8)
    codes = (torch.rand(rows, columns, generator=generator) * 2.0**widths).to(torch.uint8)
    return ColumnWeight(codes, widths, torch.rand(rows, generator=generator).to(dtype))


def same(left, right):
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("codes", "widths", "scale"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (12, 8), (17, 131), (1024, 5), (2051, 33)])
def test_packed_weights_unpack_bit_for_bit(rows, columns, dtype):
    given = weight(rows, columns, dtype)
    found = form.unpack(form.pack(given))
    assert same(found, given)
    assert found.scale.dtype == dtype


def test_a_weight_worked_by_hand():
    codes = torch.tensor([[1, 5, 0], [0, 2, 1], [1, 7, 1]], dtype=torch.uint8)
    stored = form.pack(ColumnWeight(codes, torch.tensor([1, 3, 1], dtype=torch.uint8), torch.ones(3)))
    assert stored["widths"].tolist() == [1 + 3 * 16, 1]
    # Row by row 10, 01, 11 from the lowest bit on; 5 + 2 * 8 + 7 * 64 in nine bits.
    assert stored["codes_1"].tolist() == [0b111001]
    assert stored["codes_3"].tolist() == [(5 + 2 * 8 + 7 * 64) % 256, (5 + 2 * 8 + 7 * 64) // 256]
    assert stored["weight_shape"].tolist() == [3, 3]


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (13, 77), (2051, 33)])
def test_the_stored_bytes_are_the_bits_that_are_counted_but_for_the_last_of_each_width(rows, columns):
    given = weight(rows, columns)
    stored = form.pack(given)
    taken = 8 * sum(tensor.nbytes for name, tensor in stored.items() if name != "weight_shape")
    parts = len(stored) - 2  # a byte is padded for each width, and for the map
    assert given.bits <= taken < given.bits + 8 * parts


def test_it_survives_a_file_read_by_memory_map(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    given = weight(12, 131)
    save_file(form.pack(given), tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", framework="pt") as file:
        assert same(form.unpack({name: file.get_tensor(name) for name in file.keys()}), given)  # noqa: SIM118 (no mapping)
