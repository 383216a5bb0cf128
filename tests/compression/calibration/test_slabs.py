import pytest

from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, searched_weights, slab_of, slab_weights

GB = 10**9


@pytest.mark.parametrize("memory", [16 * GB, 24 * GB, 40 * GB, 80 * GB, 141 * GB])
def test_a_gpu_solves_as_much_at_once_as_an_eighth_of_it_holds(memory):
    assert memory / 16 < slab_weights(memory) * SOLVE_BYTES <= memory / 8


def test_gpus_that_differ_by_little_solve_the_same_pieces():
    # One kind of GPU shows more or less of its memory, by what its driver and ECC take.
    assert slab_weights(79 * GB) == slab_weights(85 * GB)


def test_no_gpu_solves_less_than_a_processor():
    assert slab_weights(10**6) == slab_weights() == slab_of("cpu")


def test_a_grid_is_searched_for_in_the_cache_of_a_core_and_not_on_a_gpu():
    assert searched_weights(on_gpu=False) * 4 < 2**20 < searched_weights(on_gpu=True)
