"""What actors need, and whether the cluster has it: Ray would wait for ever for resources that do not exist."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from hasten.accel.errors import UserError

_LOG = logging.getLogger(__name__)
# Ray's resolution of resources.
_ROUNDING = 1e-4
_KIND_OF_ONE = re.compile("node_[0-9a-f]+")

Bundle = Mapping[str, float]


@dataclass(frozen=True)
class ActorResources:
    """What one actor or task asks the cluster for; memory: bytes that Ray reserves, None reserves nothing."""

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None

    @property
    def bundle(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.cpus, **self.fixed}

    @property
    def fixed(self) -> dict[str, float]:
        """What cannot be shared with others: GPUs and memory, by Ray's names."""
        return {"GPU": self.gpus} | ({} if self.memory is None else {"memory": float(self.memory)})

    def fixed_text(self, state: str = "") -> str:
        """What cannot be shared, for messages; state: such as `free`."""
        amounts = [f"{self.gpus:g} {state} GPU(s)"] if self.gpus else []
        amounts += [] if self.memory is None else [f"{self.memory} {state} bytes of memory"]
        return " and ".join(amounts).replace("  ", " ")

    def options(self, cpus: float, threads: int, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Options of Ray for an actor that asks for other CPUs; threads: of OpenMP; variables: of its environment.

        Ray must not restart an actor: it could not restore its state.
        """
        return {
            "num_cpus": cpus,
            "num_gpus": self.gpus,
            "memory": self.memory,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), **(variables or {})}},
        }


def check_workers(workers: int, needs: ActorResources) -> None:
    """UserError unless the cluster can hold all workers, each with what it needs, at the same time."""
    check([needs.bundle] * workers, f"workers={workers} of threads={needs.cpus:g}")


def check(bundles: Sequence[Bundle], asked: str) -> None:
    """UserError unless every bundle of resources fits on a node, and all of them at once in the cluster.

    Runs inside a Ray session. bundles: such as {"CPU": 2, "GPU": 1}, each of one actor or task. asked: the options
    that they come from, for the error. Where an autoscaler may add what is missing, there is a warning instead.
    """
    refusal = _refusal(nodes(), [{name: need for name, need in each.items() if need} for each in bundles], asked)
    if refusal is None:
        return
    if not grows():
        raise UserError(refusal)
    _LOG.warning("%s; waiting for the autoscaler to add what is missing", refusal)


def nodes() -> list[Bundle]:
    """Total resources of each node that is alive; inside a Ray session."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _refusal(there: Sequence[Bundle], bundles: Sequence[Bundle], asked: str) -> str | None:
    has = f"the cluster has {len(there)} node{'s' * (len(there) != 1)}: {_amounts(_sum(there), bundles)}"
    for bundle in bundles:
        if not any(_fits(bundle, node) for node in there):
            most = {name: max((node.get(name, 0.0) for node in there), default=0.0) for name in bundle}
            return (
                f"{has}, no more than {_amounts(most, [bundle])} on one; {asked} need {_amounts(bundle, [bundle])} each"
            )
    if packs(there, bundles):
        return None
    needed = _sum(bundles)
    # Enough in all, but in pieces that are too small.
    each = f", {_amounts(bundles[0], bundles[:1])} each" if _fits(needed, _sum(there)) else ""
    return f"{has}; {asked} need {_amounts(needed, bundles)}{each}"


def packs(there: Sequence[Bundle], bundles: Sequence[Bundle]) -> bool:
    """Whether all bundles find a node with room when the largest are placed first."""
    free: list[dict[str, float]] = [dict(node) for node in there]
    for bundle in sorted(bundles, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), reverse=True):
        node = next((each for each in free if _fits(bundle, each)), None)
        if node is None:
            return False
        for name, need in bundle.items():
            node[name] = node.get(name, 0.0) - need
    return True


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(need <= node.get(name, 0.0) + _ROUNDING for name, need in bundle.items())


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = {name: None for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _amounts(amounts: Bundle, wanted: Sequence[Bundle]) -> str:
    """Amounts of the CPUs and of whatever else is wanted: `4 CPUs and 0 GPUs`."""
    names = ["CPU", *(name for name in _sum(wanted) if name != "CPU")]
    return " and ".join(_amount(amounts.get(name, 0), name) for name in names)


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {name}{'s' * (name in ('CPU', 'GPU') and amount != 1)}"


def grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster; inside a Ray session.

    An autoscaler's configuration names its node types. Without one, Ray gives every node a type of its own.
    """
    return any(_KIND_OF_ONE.fullmatch(kind) is None for kind in _kinds_of_nodes())


def _kinds_of_nodes() -> list[str]:
    """Node types that the autoscaler's monitor reports; empty for a Ray that a driver started."""
    # None of this is public; `ray status` asks the same, in every version of Ray that hasten runs with.
    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    # Nothing is reported in the first seconds of a cluster.
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report")
    return list(report["active_nodes"]) if report else []
