"""A Ray cluster of two nodes with one CPU each, in a process of its own, whose nodes and actors may be killed.

What runs there is a function of this module; it returns plain values.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import psutil
import torch

from hasten.accel.compression.calibration.settings import Settings
from hasten.accel.compression.search.moves import Genome
from hasten.accel.compression.search.samples import Sample
from hasten.accel.decoding.engine import Request
from hasten.accel.evaluation.divergence import Sums
from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.actors.evaluator import EvaluatorSpec
from hasten.cluster.actors.verifier import DecodeSpec
from hasten.cluster.programs import decoding_work, evaluation
from hasten.cluster.programs import search as search_program
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.search import Evaluators
from hasten.cluster.programs.sweep_points import Ending, Pool, Work
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.prefork import forked_workers
from hasten.cluster.runtime.ray_processes import fewer_processes
from hasten.cluster.runtime.session_folders import ray_folder
from hasten.cluster.tracking.tracker import write_report
from tests.cluster.failing import Hang, failing
from tests.cluster.processes import wait_for

# Ray takes a node for dead after these; its own defaults are longer than a test should take.
_HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
_nodes: list[Any] = []
# Until the process ends.
_stack = ExitStack()


def start() -> None:
    """Start the cluster and join it."""
    import ray
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": _HEALTH}
    folder = _stack.enter_context(ray_folder())
    if folder is not None:
        head["temp_dir"] = folder
    _stack.enter_context(forked_workers())
    _stack.enter_context(fewer_processes())
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


@contextmanager
def killed_at(program: ModuleType, actor: str, method: str, count: int, mark: Path) -> Iterator[None]:
    """The second node is killed when the actor there comes to its Nth call of a method, which never ends.

    Nothing is re-executed because it is late, so that the loss cannot be overtaken, and is always met.
    """
    hanging = failing(getattr(program, actor), method, count, Hang(_nodes[1].node_id, mark))

    def kill() -> None:
        wait_for(mark.exists)
        kill_node()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with patch.object(program, actor, hanging), patch.object(recovery, "_STRAGGLER_SECONDS", float("inf")):
        yield
    killer.join()


def search(
    model: EvaluatorSpec, genomes: Sequence[Genome], sample: Sample, mark: Path
) -> tuple[list[float], int, list[str]]:
    """Losses of candidates, actors lost with a node in the middle, and what was logged."""
    with second_node() as lines, killed_at(search_program, "Evaluator", "losses", 2, mark):
        pool = Evaluators(model, 2)
        losses = pool(genomes, sample) + pool([genome[::-1] for genome in genomes], sample)
        pool.close()
        return losses, pool.restarts, lines


def decode(spec: DecodeSpec, requests: Sequence[Request], mark: Path) -> tuple[dict[str, list[int]], int, list[str]]:
    """Completions by id, actors lost with a node before its second result, and what was logged."""
    with second_node() as lines, killed_at(decoding_work, "VerifierActor", "decode", 2, mark):
        pool = Decoders(spec, 2)
        results = list(pool(requests))
        completions = {result.id: result.token_ids for result in results}
        assert len(completions) == len(results)
        pool.close()
        return completions, pool.restarts, lines


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
        pool = ActorPool("a worker", 2, ActorResources(), lambda _, cpus: actor.options(num_cpus=cpus).remote())
        pool.begin()
        homes = {home for home, _ in ray.get([each.usage.remote() for each in pool.actors])}
        victim = next(node for node in _nodes[1:] if node.node_id in homes)
        _nodes.remove(victim)
        _nodes[0].remove_node(victim, allow_graceful=False)
        while not pool.restarts:
            for index, error in pool.lost().items():
                pool.replace(index, error)
        pool.fill()
        cpus = [each for _, each in ray.get([actor.usage.remote() for actor in pool.actors])]
        pool.end()
        return cpus, pool.restarts, lines


def survivors(mark: Path) -> list[int]:
    """Processes of workers that have not ended with their node, which they had no time to notice."""
    import ray

    def stay() -> None:
        mark.write_text(str(os.getpid()))
        mark.rename(mark.with_suffix(".written"))
        threading.Event().wait()

    with second_node():
        home = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(_nodes[1].node_id, soft=False)
        task = ray.remote(stay).options(num_cpus=1, scheduling_strategy=home, max_retries=0).remote()
        wait_for(mark.with_suffix(".written").exists)
        process = psutil.Process(int(mark.with_suffix(".written").read_text()))
        kill_node()
        ray.wait([task])
        return [each.pid for each in psutil.wait_procs([process], timeout=30)[1]]


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
            # Or else this node may have done everything before a worker of the other one has started.
            wait_for(mark.exists)
            return usual(*arguments)

        def kill() -> None:
            wait_for(mark.exists)
            kill_node()

        threading.Thread(target=kill, daemon=True).start()
        # As above: a copy on the other node must not overtake the loss.
        with patch.object(evaluation, "_evaluate", task), patch.object(recovery, "_STRAGGLER_SECONDS", float("inf")):
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
    _stack.enter_context(forked_workers())
    _stack.enter_context(fewer_processes())
    node = _patiently(init)
    work = CalibrationPass(settings, tokens, 2)
    work.task.output.open(settings.fingerprint(work.task.checkpoint, tokens), overwrite=False)
    work.run()
    (here,) = ray.nodes()
    assert node.address_info["node_id"] == here["NodeID"]
    stats = node_stats(here["NodeManagerAddress"], here["NodeManagerPort"], include_memory_info=False)
    ray.shutdown()
    return int(stats.store_stats.spilled_bytes_total)
