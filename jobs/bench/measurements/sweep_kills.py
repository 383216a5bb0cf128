"""SIGKILLs of `hasten bench sweep`: drivers, workers, actors and a node of a running sweep."""

import contextlib
import itertools
import logging
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from hasten.cluster.programs.sweep_points import read_point
from hasten.jobs.bench.sweep import Config, sweep_command

_LOG = logging.getLogger(__name__)
_DRIVER, _ACTOR, _WORKER, _NODE = "driver", "actor", "worker", "node"


def kill_sweep(config: Config, folder: Path) -> dict[str, float]:
    """Run a sweep, kill its drivers, workers, actors and a node, and count points that are lost or repeated."""
    chance = random.Random(config.seed)
    kinds = [_NODE, *itertools.islice(itertools.cycle((_DRIVER, _WORKER, _ACTOR)), config.kills - 1)]
    chance.shuffle(kinds)
    place, done = folder / "killed", folder / "done"
    delivered: Counter[str] = Counter()
    starts = 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    extra = cluster.add_node(num_cpus=2)
    words = [f"done={done}", f"sweep.address={cluster.address}", "steps=5", "actor=true"]
    try:
        while True:
            starts += 1
            driver = subprocess.Popen(
                sweep_command(place, config.points, config.point_seconds, words), cwd=folder, stdout=subprocess.DEVNULL
            )
            while driver.poll() is None and kinds:
                time.sleep(chance.uniform(1.0, 3.0))
                if driver.poll() is not None or not _running(place):
                    continue
                if kinds[-1] == _NODE:
                    cluster.remove_node(extra, allow_graceful=False)
                    extra = cluster.add_node(num_cpus=2)
                elif kinds[-1] == _DRIVER:
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                elif not _kill_one(_actors() if kinds[-1] == _ACTOR else _running(place), chance):
                    continue
                delivered[kinds.pop()] += 1
                _LOG.info("killed: %s", ", ".join(f"{count} {kind}" for kind, count in sorted(delivered.items())))
            if driver.wait() == 0:
                break
            if driver.returncode not in (1, -signal.SIGKILL):
                raise RuntimeError(f"the sweep ended with {driver.returncode}")
        if kinds:
            _LOG.warning("the sweep ended before %d of the kills", len(kinds))
    finally:
        cluster.shutdown()
    ended = Counter(done.read_text().split())
    return {
        "kills": sum(delivered.values()),
        **{f"killed_{kind}s": count for kind, count in delivered.items()},
        "sweep_starts": starts,
        "points_ended": len(ended),
        "points_ended_twice": sum(count > 1 for count in ended.values()),
        "points_in_mlflow": len(_children(folder / "killed.db")),
        "different_points_in_mlflow": len(set(_children(folder / "killed.db"))),
    }


def _running(place: Path) -> list[int]:
    """Process ids of running points."""
    facts = [read_point(path) for path in place.glob("points/*")]
    return [fact["process"] for fact in facts if fact.get("status") == "running"]


def _actors() -> list[int]:
    """Process ids of the points' actors, on the cluster that this process started."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("Waiter" in word for word in process.cmdline()[:1]):
                pids.append(process.pid)
    return pids


def _kill_one(pids: Sequence[int], chance: random.Random) -> bool:
    """Send SIGKILL to one of these processes; False if none is alive."""
    for pid in chance.sample(pids, len(pids)):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            # A killed driver leaves points marked as running, whose process ids may have been reused.
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                process.kill()
                return True
    return False


def _children(file: Path) -> list[str]:
    """Point numbers of the finished, not deleted runs in an MLflow store."""
    query = (
        "select params.value from params join runs on runs.run_uuid = params.run_uuid "
        "where params.key = 'point' and runs.lifecycle_stage = 'active' and runs.status = 'FINISHED' "
        "and runs.run_uuid in (select run_uuid from tags where key = 'hasten.point')"
    )
    with sqlite3.connect(file) as database:
        return [str(value) for (value,) in database.execute(query)]
