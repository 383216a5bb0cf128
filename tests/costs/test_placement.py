"""Processes are placed where there is room; those that fit nowhere are refused with the lacking resource."""

import pytest

from hasten.accel.costs.estimate import Estimate, Process, Step
from hasten.accel.costs.placement import Node, place

NODE = Node(cpus=8, memory=100, gpus=2, gpu_memory=50)


def worker(count=1, host=10, device=20, cpus=1.0, gpus=1.0, stage=0):
    return Process("worker", count, cpus, {"run": {"all": host}}, gpus, {"run": {"all": device}}, stage)


DRIVER = Process("driver", 1, 0, {"run": {"all": 30}})


def test_workers_are_spread_over_nodes_and_the_driver_is_on_the_first():
    found = place([worker(4), DRIVER], [NODE, NODE])
    assert found.fits
    assert [each.processes for each in found.nodes] == [{"driver": 1, "worker": 2}, {"worker": 2}]
    assert [each.memory for each in found.nodes] == [50, 20]
    assert [each.gpu_memory for each in found.nodes] == [20, 20]


@pytest.mark.parametrize(
    ("process", "resource", "count", "needed", "there"),
    [
        (worker(5), "gpus", 1, 1, 0),
        (worker(1, device=51), "gpu_memory", 1, 51, 50),
        (worker(2, host=150), "memory", 2, 150, 100),
        (worker(1, cpus=9), "cpus", 1, 9, 8),
    ],
)
def test_processes_that_fit_nowhere_are_refused_with_the_lacking_resource(process, resource, count, needed, there):
    (refusal,) = place([process], [NODE, NODE]).refused
    assert (refusal.resource, refusal.count, refusal.needed, refusal.available) == (resource, count, needed, there)


def test_stages_use_the_same_node_one_after_the_other():
    first = Estimate((worker(2, host=30), DRIVER), (Step("a", 1, 2),), written={"x": 1})
    both = first.joined(Estimate((worker(2, host=35),), (Step("b", 3, 4, waits=1),), written={"x": 2, "y": 5}))
    found = place(both.processes, [NODE])
    assert found.fits
    assert found.nodes[0].memory == 30 + 2 * 35
    assert both.written == {"x": 3, "y": 5}
    assert both.cpu_seconds == 6
    assert both.seconds(0.5) == 2 + 6 + 1


def test_a_node_that_grows_has_processors_for_all():
    assert place([worker(1, cpus=9, gpus=0)], [Node(cpus=2, memory=100, grows=True)]).fits


def test_the_object_store_takes_memory_of_the_nodes_that_are_used_once():
    shared = Process("worker", 2, 1, {"run": {"own": 10, "sums in the object store": 40}})
    found = place([shared], [NODE], store=40)
    assert shared.peak_bytes == 50
    assert found.nodes[0].memory == 2 * 10 + 40
