"""Launch configurations: defaults suit the shape, the fastest measured one is kept in the cache and used."""

import pytest
import torch

from hasten.kernels.packed_gemm.choice import (
    Gemv,
    Gpu,
    Matmul,
    candidates,
    configuration,
    default,
    measure,
    problem,
)

H200 = Gpu("NVIDIA H200", 132)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096), (14336, 4096), (8192, 28672), (16, 32)])
def test_one_row_is_multiplied_without_tensor_cores_by_programs_that_fill_the_gpu(shape, bits):
    chosen = default(problem(1, *shape, bits, 2), H200)
    assert isinstance(chosen, Gemv)
    programs = -(-shape[0] // (8 * chosen.rows_of_thread)) * chosen.splits
    assert programs >= min(115, -(-shape[0] // 8))
    # A tile is no wider than a row: each warp reads 64 bytes of it.
    assert chosen.warps == 2 or chosen.warps * 64 <= shape[1] * bits // 8


@pytest.mark.parametrize("gpu", [H200, Gpu("NVIDIA A100-SXM4-80GB", 108), Gpu("another", 20)])
@pytest.mark.parametrize("n", [5, 16, 64, 512])
def test_more_rows_are_multiplied_by_tensor_cores(n, gpu):
    chosen = default(problem(n, 4096, 4096, 4, 2), gpu)
    assert isinstance(chosen, Matmul)
    assert 16 <= chosen.block_n <= 128
    assert 4096 // chosen.splits >= chosen.block_k


def test_the_fastest_candidate_is_used_by_later_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    pytest.importorskip("triton")
    device = torch.device("cpu")
    first, second = problem(3, 256, 256, 4, 2), problem(64, 256, 256, 4, 2)
    assert configuration(first, device) == default(first, Gpu("interpreter", 1))
    choices = candidates(first, Gpu("interpreter", 1))
    slow = dict.fromkeys(choices, 2.0)
    assert measure(first, device, lambda chosen: 1.0 if chosen == choices[-1] else slow[chosen]) == choices[-1]
    # A configuration that the GPU cannot run is infinitely slow.
    measure(second, device, lambda chosen: 1.0 if chosen.splits == 2 else float("inf"))
    from hasten.kernels.packed_gemm import choice

    choice._measured.cache_clear()
    assert configuration(first, device) == choices[-1] != choices[0]
    assert configuration(second, device).splits == 2
    # Rows of x are rounded up to a power of two.
    assert configuration(problem(4, 256, 256, 4, 2), device) == choices[-1]
