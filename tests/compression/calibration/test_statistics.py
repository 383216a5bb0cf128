import copy

import pytest
import torch

from hasten.accel.compression.calibration.statistics import Hessian, Tree, split


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [5, 256, 300])
def test_the_mean_is_the_hessian_in_the_requested_order(columns):
    x = inputs(40, columns)
    hessian = Hessian(columns)
    hessian.add(x[:15])
    hessian.add(x[15:])
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    expected = (x.T @ x / 40)[order][:, order]
    torch.testing.assert_close(hessian.mean(order), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hessian.diagonal(), x.square().mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [0, 4])
@pytest.mark.parametrize("chunks", [1, 5, 8])
def test_any_split_of_the_chunks_gives_the_same_bits(chunks, cut):
    sums = []
    for number in range(chunks):
        hessian = Hessian(300)
        hessian.add(inputs(7, 300, number) * 10.0**number)  # sizes that make the order of additions matter
        sums.append(hessian)
    totals = []
    for workers in (1, 2, 3, chunks):
        whole = Tree(cut)
        for part in reversed(split(chunks, workers)):
            own = Tree(cut)
            for number in part:
                own.add(number, 1, copy.deepcopy(sums[number]))
            for (start, size), node in own.nodes.items():
                array = node.array().copy()
                array.flags.writeable = False  # as it comes out of an object store
                whole.add(start, size, Hessian.from_array(300, array, node.tokens))
        totals.append(whole.total())
    assert totals[0].tokens == 7 * chunks
    halves = totals[0].halves
    assert (halves is not None) == (0 < cut < chunks)
    if halves is not None:
        assert [half.tokens for half in halves] == [7 * cut, 7 * (chunks - cut)]
        order = torch.arange(300)
        both = sum(half.mean(order) * half.tokens for half in halves) / totals[0].tokens
        torch.testing.assert_close(both, totals[0].mean(order), rtol=1e-4, atol=0.1)
    for total in totals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(total.panels(), totals[0].panels(), strict=True))


def test_bfloat16_inputs_lose_nothing_in_the_products():
    x = inputs(64, 300).bfloat16()
    hessian = Hessian(300)
    hessian.add(x)
    expected = x.double().T @ x.double() / 64
    # Products of bfloat16 numbers are exact in float32: what is left is the rounding of 64 additions.
    torch.testing.assert_close(hessian.mean(torch.arange(300)).double(), expected, rtol=0, atol=2e-6)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_splitting_keeps_the_order_and_leaves_nobody_idle():
    assert [list(part) for part in split(8, 3)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert [len(part) for part in split(2, 5)] == [1, 1]
