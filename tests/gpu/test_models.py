"""Blocks and output layer of the embedded model."""

import pytest
import torch

from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

pytestmark = pytest.mark.gpu


def test_every_block_and_the_head_give_what_they_give_on_a_cpu(on_cpu, on_device, token_ids):
    expected, hidden = on_cpu.embed(token_ids[:4]), on_device.embed(token_ids[:4])
    for index in range(on_cpu.num_blocks):
        expected = on_cpu.run_block(on_cpu.load_block(index), index, expected)
        hidden = on_device.run_block(on_device.load_block(index), index, hidden)
        # Sums of 256 to 896 float32 products in another order, block after block.
        torch.testing.assert_close(hidden.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(on_device.head(hidden).cpu(), on_cpu.head(expected), rtol=1e-3, atol=5e-3)


def test_a_block_in_bfloat16_stays_close_to_float32(folder, device, on_cpu, token_ids):
    reduced = Architecture(Checkpoint(folder), torch.bfloat16, device)
    expected = on_cpu.run_block(on_cpu.load_block(0), 0, on_cpu.embed(token_ids[:4]))
    hidden = reduced.run_block(reduced.load_block(0), 0, reduced.embed(token_ids[:4]))
    assert hidden.dtype == torch.bfloat16
    # 8 bits of mantissa, rounded a dozen times on the way.
    error = (hidden.cpu().float() - expected).norm() / expected.norm()
    assert error < 0.02
