"""Seconds are work divided by rates."""

import pytest

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.levels.level import make_levels
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.costs.estimate import Estimate, Process, Step, Work
from hasten.accel.costs.solving import stack_of
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.costs.rates import RATES
from tests.models import tiny


def test_seconds_of_work_add_up_over_its_kinds():
    work = Work(flops=2e9, exact_flops=3e9, elements=4e9, launches=5e6, memory_bytes=6e9, file_bytes=7e9)
    assert work.seconds(RATES) == pytest.approx(2 + 3 + 4 + 5 + 6 + 7)
    assert (work + work * 0.5).seconds(RATES) == pytest.approx(1.5 * work.seconds(RATES))


def test_the_peak_is_the_phase_that_takes_most():
    process = Process("worker", 1, 1, {"one": {"a": 3, "b": 4}, "other": {"c": 6, "sums in the object store": 5}})
    assert process.peak_bytes == 11
    assert process.own_bytes == 7
    assert process.peak_parts == {"c": 6, "sums in the object store": 5}
    assert process.device_bytes == 0


def test_a_step_takes_longer_where_processors_are_shared():
    step = Step("a", seconds=2, cpu_seconds=12, waits=1)
    assert step.wall() == 3
    assert step.wall(share=0.5) == 5
    assert step.wall(processors=4) == 4
    assert Estimate((), (step, step)).seconds(0.5, 4) == 14


def test_methods_cost_by_their_hyperparameters(tmp_path):
    folder = tiny.save(tmp_path / "model", "llama")
    (level,) = make_levels([4], [32], True)
    group = make_layer_groups(Architecture(Checkpoint(folder)), level, (), 0, 0)[0][0]
    weights, columns = (64 + 2 * 32) * 64, 64
    layers = stack_of(group)
    nearest = RoundToNearest().cost(layers, level.scheme)
    assert nearest.solve.exact_flops == 0
    assert nearest.prepare == Work()
    # One solve: the propagated error of finished columns, the outputs themselves, and their error.
    assert GPTQ(refits=0).cost(layers, level.scheme).solve.exact_flops == 3 * weights * columns
    # Two solves and two fits.
    assert GPTQ(refits=2).cost(layers, level.scheme).solve.exact_flops == (4 + 4) * weights * columns
    searched = [RoundToNearest(search=tried).cost(layers, level.scheme).solve.elements for tried in (10, 20, 30)]
    assert searched[2] - searched[1] == searched[1] - searched[0] > 0


def test_a_gpu_solves_larger_pieces_in_fewer_launches(tmp_path):
    folder = tiny.save(tmp_path / "model", "llama", hidden_size=1024, intermediate_size=8192)
    (level,) = make_levels([4], [32], True)
    group = next(
        group
        for group in make_layer_groups(Architecture(Checkpoint(folder)), level, (), 0, 0)[0]
        if group.columns == 8192
    )
    on_cpu, on_gpu = (GPTQ().cost(stack_of(group, memory), level.scheme).solve for memory in (0, 80 * 10**9))
    assert on_gpu.launches < 0.6 * on_cpu.launches, "8 million weights are two slabs of a processor and one of a GPU"
    assert on_gpu.exact_flops == on_cpu.exact_flops
    assert on_gpu.elements == on_cpu.elements
