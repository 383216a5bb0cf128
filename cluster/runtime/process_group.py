"""A group of Ray actors, one a rank, in one process group of torch.distributed that DeepSpeed initialises.

All ranks are on one node, in one placement group. A rank whose peer is gone may wait for it for ever, so a group lives
and dies as a whole: the first rank that fails takes the others with it, and no actor of it is restarted alone.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hasten.accel.errors import UserError
from hasten.cluster.runtime import placement, recovery
from hasten.cluster.runtime.actor_pool import start_actor
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes

# A rank that lost its peer often raises an error of its own before Ray reports the loss, which takes up to a second.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.5
_HOST = "127.0.0.1"


class Rank:
    """Base class of the actors of a group. rank, size: known once the actor has joined."""

    rank: int = 0
    size: int = 1

    def place(self) -> tuple[int, str]:
        """A free port of this node, and the GPUs that Ray gave to this actor, as CUDA_VISIBLE_DEVICES."""
        with socket.socket() as listener:
            listener.bind((_HOST, 0))
            port: int = listener.getsockname()[1]
        return port, os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def join(self, rank: int, device: str, *places: tuple[int, str]) -> None:
        """Join the process group; returns once all ranks have. places: of all ranks, in their order."""
        size = len(places)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(places[0][0]),
            "DS_ACCELERATOR": "cpu" if device == "cpu" else "cuda",
        }
        if device != "cpu":
            # DeepSpeed takes GPU number LOCAL_RANK, and NCCL copies directly between GPUs that a process sees.
            gpus = dict.fromkeys(gpu for _, visible in places for gpu in visible.split(",") if gpu)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # These read the variables when they are imported.
        deepspeed = _import_deepspeed()
        import torch

        if device == "cpu":
            # Compiling this op takes minutes, and its lock file blocks all later starts if the compiler was killed.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            torch.cuda.set_device(rank)
        deepspeed.init_distributed(
            dist_backend="gloo" if device == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=30),
        )
        self.rank, self.size = rank, size

    def usage(self) -> dict[str, float]:
        """CPU seconds of this process so far, and its peak resident memory in bytes."""
        return {"cpu_seconds": cpu_seconds(), "peak_rss_bytes": peak_rss_bytes()}


def _import_deepspeed() -> Any:
    """DeepSpeed without MLflow, which its autotuner imports if it can: 1.3 of 1.6 seconds, and 100 MB of every rank."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    return deepspeed


class ProcessGroup:
    """`size` actors of a class, started and joined without waiting for them; inside a Ray session.

    kind: the class. arguments: of its constructor, the same for all ranks. needs: resources of each rank. device: cpu
    (gloo) or cuda (NCCL). name: in messages. cpus: CPUs that each rank requests instead of needs.cpus; with 0, and
    without GPUs or memory, the ranks share the CPUs of the node that has most. variables: environment variables.
    """

    def __init__(
        self,
        kind: type[Rank],
        size: int,
        needs: ActorResources,
        arguments: Sequence[object] = (),
        device: str = "cpu",
        name: str = "a group",
        cpus: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        require_deepspeed(name)
        self.name = name
        cpus = needs.cpus if cpus is None else cpus
        self._closed = threading.Event()
        bundle = {key: amount for key, amount in {"CPU": cpus, **needs.fixed}.items() if amount}
        self._placement = placement_group([bundle] * size, strategy="STRICT_PACK") if bundle else None
        self.ranks: list[Any] = []
        for rank in range(size):
            options = needs.options(cpus, max(1, int(needs.cpus)), variables)
            options |= {"scheduling_strategy": self._strategy(rank)}
            self.ranks.append(start_actor(kind, options, *arguments))
        places = [actor.place.remote() for actor in self.ranks]
        self._joined = [actor.join.remote(rank, device, *places) for rank, actor in enumerate(self.ranks)]
        self._watched: list[ObjectRef] = []
        self._error: RayError | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def call(self, method: str, *arguments: object) -> list[Any]:
        """Results of a method of all ranks, in their order.

        The first error ends the whole group at once, and is raised: that of the rank that was lost, if one was.
        """
        return self.results([getattr(actor, method).remote(*arguments) for actor in self.ranks])

    def results(self, calls: Sequence[ObjectRef]) -> list[Any]:
        """Results of calls to different ranks, in their order; errors as in `call`."""
        waiting = [*self._joined, *calls]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                ray.get(ready)
            except RayError as error:
                cause = self.cause(error, waiting)
                self.close()
                recovery.raise_if_refused(cause)
                raise cause from None
        return list(ray.get(list(calls)))

    def cause(self, error: RayError, others: Sequence[ObjectRef] = ()) -> RayError:
        """The error of the rank because of which another one failed with `error`, or `error` itself.

        others: calls whose errors may be the cause. Waits for a few seconds, unless `error` is a loss or a UserError.
        """
        if self._error is not None or _is_final(error):
            return self._error or error
        probes = [*others, *self._joined, *self._watched, *(actor.usage.remote() for actor in self.ranks)]
        until = time.monotonic() + _GRACE_SECONDS
        while probes and time.monotonic() < until:
            ready, probes = ray.wait(probes, timeout=_POLL_SECONDS)
            for reference in ready:
                try:
                    ray.get(reference)
                except RayError as other:
                    if _is_final(other):
                        return other
        return error

    def watch(self, calls: Sequence[ObjectRef], endless: bool = True) -> None:
        """End the group as soon as one of these calls fails.

        endless: whether they are meant to last as long as the group, which ends with any of them.
        A thread waits for them, so that a rank of which nothing is asked at the moment is watched, too.
        """
        if not calls:
            return
        self._watched += calls
        threading.Thread(target=self._wait_for_end, args=(list(calls), endless), daemon=True).start()

    def close(self) -> None:
        """End all ranks, and free their resources."""
        if self._closed.is_set():
            return
        self._closed.set()
        for actor in self.ranks:
            with suppress(RayError):  # raised for an actor that could not be created
                ray.kill(actor)
        if self._placement is not None:
            remove_placement_group(self._placement)

    def _wait_for_end(self, calls: list[ObjectRef], endless: bool) -> None:
        waiting = [*self._joined, *calls]
        # After the end of the session, Ray would start another one for a call.
        while waiting and not self._closed.is_set() and ray.is_initialized():
            ready, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
            for reference in ready:
                try:
                    ray.get(reference)
                except RayError as error:
                    self._error = self.cause(error, waiting)
                else:
                    if reference in self._joined or not endless:
                        continue
                self.close()
                return
        # Results stay in the object store for as long as they are referred to.
        self._watched = [call for call in self._watched if call not in calls]

    def _strategy(self, rank: int) -> object:
        if self._placement is not None:
            return PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
        alive = [node for node in ray.nodes() if node["Alive"]]
        largest = max(alive, key=lambda node: (node["Resources"].get("CPU", 0), node["NodeID"]))
        return NodeAffinitySchedulingStrategy(largest["NodeID"], soft=True)


def group_needs(size: int, needs: ActorResources) -> ActorResources:
    """Resources of all ranks of a group together; one node must have them."""
    memory = None if needs.memory is None else size * needs.memory
    return ActorResources(size * needs.cpus, size * needs.gpus, memory)


def check_group(size: int, needs: ActorResources, option: str, groups: int = 1) -> None:
    """UserError unless the cluster has room for the groups; runs inside a Ray session. option: names the size."""
    bundle: Mapping[str, float] = group_needs(size, needs).bundle
    ranks = f"{option}={size} with threads={needs.cpus:g}, on one node,"
    placement.check([bundle] * groups, ranks if groups == 1 else f"{groups} groups of {ranks}")


def require_deepspeed(name: str) -> None:
    """UserError where DeepSpeed is not installed. name: what needs it."""
    if find_spec("deepspeed") is None:
        raise UserError(f"{name} needs DeepSpeed, which is not installed: pip install 'hasten[distributed]'")


def _is_final(error: RayError) -> bool:
    """Whether an error is a cause, and not a consequence of another rank's failure."""
    if recovery.is_loss(error) or recovery.is_out_of_memory(error):
        return True
    return isinstance(getattr(error, "cause", None), UserError) or bool(getattr(error, "actor_init_failed", False))
