"""A Ray cluster of two nodes with one CPU each, in a process of its own, whose nodes and actors may be killed.

What runs there is a function of this module; it returns plain values.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.accel.decoding.engine import Request
from hasten.accel.evaluation.divergence import Sums
from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.actors.verifier import Spec
from hasten.cluster.programs import evaluation
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.search import Evaluators, Model
from hasten.cluster.programs.sweep_points import Ending, Pool, Work
from hasten.cluster.runtime.actor_pool import Crew
from hasten.cluster.tracking.tracker import write_report
from tests.cluster.processes import processes, wait_for

# Ray takes a node for dead after these; its own defaults are longer than a test should take.
_HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
_nodes: list[Any] = []


def start() -> None:
    """Start the cluster and join it."""
    import ray
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": _HEALTH}
    _nodes.append(_patiently(lambda: Cluster(initialize_head=True, head_node_args=head)))
    ray.init(address=_nodes[0].address, log_to_driver=False, logging_level=logging.ERROR)


def _patiently(make: Callable[[], Any]) -> Any:
    """What is made: on a busy machine the start can outlast a fixed wait inside Ray."""
    for _ in range(4):
        try:
            return make()
        except Exception as error:
            if "timed out" not in str(error):
                raise
    return make()


def end() -> None:
    """End it."""
    import ray

    ray.shutdown()
    _nodes[0].shutdown()


def kill_node() -> None:
    """SIGKILL everything on the second node."""
    _nodes[0].remove_node(_nodes.pop(), allow_graceful=False)


@contextmanager
def second_node() -> Iterator[list[str]]:
    """The second node, which may be killed meanwhile; yields what is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    _nodes.append(_patiently(lambda: _nodes[0].add_node(num_cpus=1)))
    logging.getLogger("hasten.cluster").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("hasten.cluster").removeHandler(handler)
        while len(_nodes) > 1:
            _nodes[0].remove_node(_nodes.pop(), allow_graceful=True)


def compress(settings: Settings, tokens: torch.Tensor) -> tuple[list[int], int, list[str]]:
    """A compression that loses a node after its second block: blocks done, actors lost, and what was logged."""
    with second_node() as lines:
        work = CalibrationPass(settings, tokens, 2)
        work.task.output.open(settings.fingerprint(work.task.checkpoint, tokens), overwrite=False)
        report = work.run(lambda count, row: kill_node() if count == 2 else None)
        return [row["block"] for row in report.blocks], report.restarts, lines


def search(model: Model, genomes: Sequence[Genome], sample: Sample) -> tuple[list[float], int, list[str]]:
    """Losses of candidates, measured while a node is lost, actors lost, and what was logged."""
    with second_node() as lines:
        pool = Evaluators(model, 2)
        pool(genomes[:1], sample)
        # What is not there yet is no loss.
        wait_for(lambda: len(processes("Evaluator")) == 2)
        killer = threading.Timer(0.05, kill_node)
        killer.start()
        found = pool(genomes, sample)
        killer.join()
        again = pool([genome[::-1] for genome in genomes], sample)
        # The other one takes what is late: it may be through with all before Ray knows of the loss, which others meet.
        shift, deadline = 0, time.monotonic() + 60
        while not pool.restarts and time.monotonic() < deadline:
            shift += 1
            pool([genome[shift:] + genome[:shift] for genome in genomes], sample)
        pool.close()
        return found + again, pool.restarts, lines


def decode(spec: Spec, requests: Sequence[Request]) -> tuple[dict[str, list[int]], int, list[str]]:
    """Completions by id, of which the first comes before a node is lost, actors lost, and what was logged."""
    with second_node() as lines:
        pool = Decoders(spec, 2)
        stream = pool(requests)
        results = [next(stream)]
        # What is not there yet is no loss.
        wait_for(lambda: len(processes("VerifierActor")) == 2)
        kill_node()
        results += stream
        found = {result.id: result.token_ids for result in results}
        assert len(found) == len(results)
        # The other node may be through with all prompts before Ray knows of the loss: later ones meet it.
        deadline = time.monotonic() + 60
        while not pool.restarts and time.monotonic() < deadline:
            assert {result.id: result.token_ids for result in pool(requests)} == found
        pool.close()
        return found, pool.restarts, lines


def sweep(folder: Path) -> tuple[list[str], list[str]]:
    """Points that end while a node is lost in the middle: how they ended, and the line that each wrote at its end."""
    with second_node():
        points = _Points(
            [Work(str(number), folder / str(number), partial(_point, folder, number)) for number in range(8)]
        )
        Pool().run(points)
        return [points.endings[str(number)] for number in range(8)], (folder / "done").read_text().split()


class _Points:
    """The points of `sweep`; the node is killed when the second one has ended, and others run on it."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._left = list(works)
        self.endings: dict[str, str] = {}

    def next(self) -> Work | None:
        return self._left.pop(0) if self._left else None

    def left(self) -> int:
        return len(self._left)

    def started(self, work: Work) -> None:
        if len(self.endings) == 2 and len(_nodes) > 1:
            kill_node()

    def ended(self, work: Work, ending: Ending) -> None:
        self.endings[work.name] = ending.status

    def waiting(self) -> None:
        pass


def _point(folder: Path, number: int) -> None:
    time.sleep(0.5)
    with (folder / "done").open("a") as file:
        file.write(f"{number}\n")
    write_report(folder / str(number), {"metrics": {"point": number}})


class _Worker:
    """An actor that tells its node and its CPUs."""

    def usage(self) -> tuple[str, float]:
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_assigned_resources().get("CPU", 0.0)


def succeed() -> tuple[list[float], int, list[str]]:
    """CPUs of two actors, one of which lost its node while a third has room, actors lost, and what was logged."""
    import ray

    with second_node() as lines:
        _nodes.append(_patiently(lambda: _nodes[0].add_node(num_cpus=1)))
        actor: Any = ray.remote(_Worker)
        crew = Crew("a worker", 2, 1, 0, lambda _, cpus: actor.options(num_cpus=cpus).remote())
        crew.begin()
        homes = {home for home, _ in ray.get([each.usage.remote() for each in crew.actors])}
        victim = next(node for node in _nodes[1:] if node.node_id in homes)
        _nodes.remove(victim)
        _nodes[0].remove_node(victim, allow_graceful=False)
        while not crew.restarts:
            for index, error in crew.lost().items():
                crew.replace(index, error)
        crew.fill()
        cpus = [each for _, each in ray.get([actor.usage.remote() for actor in crew.actors])]
        crew.end()
        return cpus, crew.restarts, lines


def evaluate(folder: Path, windows: Windows, mark: Path) -> tuple[Sums, list[str]]:
    """Sums over windows, of which some are taken on a node that is lost, and what was logged."""
    usual = evaluation._evaluate

    with second_node() as lines:
        doomed = _nodes[1].node_id

        def task(*arguments: Any) -> Any:
            import ray

            if ray.get_runtime_context().get_node_id() == doomed:
                mark.touch()
                threading.Event().wait()
            return usual(*arguments)

        def kill() -> None:
            wait_for(mark.exists)
            kill_node()

        threading.Thread(target=kill, daemon=True).start()
        with patch.object(evaluation, "_evaluate", task):
            return evaluation.measure(folder, None, windows, 2, batch=1).sums, lines


def compress_in_little_room(settings: Settings, tokens: torch.Tensor) -> int:
    """A compression on a Ray of its own with the smallest object store that there is; bytes that were spilled."""
    import ray
    from ray._private.internal_api import node_stats

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

    def init() -> Any:
        return ray.init(
            "local", num_cpus=2, object_store_memory=80 * 10**6, include_dashboard=False, log_to_driver=False
        )

    torch.set_num_threads(1)
    node = _patiently(init)
    work = CalibrationPass(settings, tokens, 2)
    work.task.output.open(settings.fingerprint(work.task.checkpoint, tokens), overwrite=False)
    work.run()
    (here,) = ray.nodes()
    assert node.address_info["node_id"] == here["NodeID"]
    stats = node_stats(here["NodeManagerAddress"], here["NodeManagerPort"], include_memory_info=False)
    ray.shutdown()
    return int(stats.store_stats.spilled_bytes_total)
