import json
import logging

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime import placement
from hasten.cluster.runtime.placement import ActorResources, check, check_workers, grows, packs

TWO_NODES = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 2.0, "GPU": 1.0}]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes that nobody adds to, without Ray."""
    monkeypatch.setattr(placement, "nodes", lambda: TWO_NODES)
    monkeypatch.setattr(placement, "grows", lambda: False)


FITS = {
    "all CPUs": [{"CPU": 1}] * 4,
    "both nodes": [{"CPU": 2}] * 2,
    "the one GPU, asked for last": [{"CPU": 1}] * 3 + [{"CPU": 1, "GPU": 1}],
    "tenths that add up to one": [{"GPU": 0.1}] * 10,
    "nothing": [],
    "no CPU": [{"CPU": 0, "GPU": 0}],
}


@pytest.mark.parametrize("bundles", FITS.values(), ids=list(FITS))
def test_what_fits_passes(cluster, bundles):
    check(bundles, "workers=4")
    assert packs(TWO_NODES, bundles)


def test_more_than_there_is_names_the_cluster_the_options_and_the_need(cluster):
    with pytest.raises(UserError) as caught:
        check_workers(8, ActorResources(1, 1))
    assert str(caught.value) == (
        "the cluster has 2 nodes: 4 CPUs and 1 GPU; workers=8 of threads=1 need 8 CPUs and 8 GPUs"
    )


def test_more_than_any_node_has_is_refused_even_where_the_sum_would_do(cluster):
    with pytest.raises(UserError) as caught:
        check_workers(1, ActorResources(3))
    assert str(caught.value) == (
        "the cluster has 2 nodes: 4 CPUs, no more than 2 CPUs on one; workers=1 of threads=3 need 3 CPUs each"
    )


def test_room_in_pieces_that_are_too_small_is_no_room(monkeypatch, cluster):
    monkeypatch.setattr(placement, "nodes", lambda: [{"CPU": 3.0}, {"CPU": 3.0}])
    with pytest.raises(UserError, match="2 nodes: 6 CPUs; workers=3 of threads=2 need 6 CPUs, 2 CPUs each"):
        check_workers(3, ActorResources(2))


def test_a_cluster_that_grows_is_waited_for(monkeypatch, cluster, caplog):
    monkeypatch.setattr(placement, "grows", lambda: True)
    with caplog.at_level(logging.WARNING):
        check_workers(8, ActorResources(1))
    assert "workers=8 of threads=1 need 8 CPUs; waiting for the autoscaler" in caplog.text


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, False),
        ({"autoscaler_report": {"active_nodes": {}}}, False),
        ({"autoscaler_report": {"active_nodes": {"node_32eda203817a895e2277a47c83c2adc4b93a5aa5e36f": 1}}}, False),
        ({"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}, True),
        ({"autoscaler_report": {"active_nodes": {"headgroup": 1, "workers": 3}}}, True),
    ],
)
def test_nodes_of_kinds_with_names_are_an_autoscalers(ray_session, monkeypatch, told, expected):
    status = json.dumps(told).encode()
    monkeypatch.setattr(placement, "_internal_kv_get", lambda key: status)
    assert grows() is expected


def test_what_is_not_asked_for_need_not_be_there():
    assert packs([{"CPU": 1.0}], [{"CPU": 1, "GPU": 0}])


def test_large_bundles_are_placed_before_small_ones():
    assert packs([{"CPU": 3.0}, {"CPU": 2.0}], [{"CPU": 1}, {"CPU": 1}, {"CPU": 3}])
    assert not packs([{"CPU": 2.0}, {"CPU": 2.0}], [{"CPU": 1}, {"CPU": 3}])


@pytest.mark.ray
def test_a_session_of_our_own_has_its_processors_and_does_not_grow(ray_session):
    assert not grows()
    check_workers(4, ActorResources(1))
    with pytest.raises(UserError, match=r"the cluster has 1 node: 4 CPUs; workers=5 of threads=1 need 5 CPUs"):
        check_workers(5, ActorResources(1))
