"""Resources of actors, and checks that the cluster has them: Ray would wait for ever for missing resources."""

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
# Node type that Ray makes up for each node of a cluster without an autoscaler's configuration.
_DEFAULT_TYPE = re.compile("node_[0-9a-f]+")

Bundle = Mapping[str, float]


@dataclass(frozen=True)
class ActorResources:
    """Resources that an actor or task requests. memory: bytes that Ray reserves; None reserves none."""

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None

    @property
    def bundle(self) -> dict[str, float]:
        """All resources by Ray's names."""
        return {"CPU": self.cpus, **self.fixed}

    @property
    def fixed(self) -> dict[str, float]:
        """Resources that cannot be shared: GPUs and memory, by Ray's names."""
        return {"GPU": self.gpus} | ({} if self.memory is None else {"memory": float(self.memory)})

    def fixed_text(self, state: str = "") -> str:
        """The resources that cannot be shared, for messages. state: an adjective for them, such as `free`."""
        amounts = [f"{self.gpus:g} {state} GPU(s)"] if self.gpus else []
        amounts += [] if self.memory is None else [f"{self.memory} {state} bytes of memory"]
        return " and ".join(amounts).replace("  ", " ")

    def options(self, cpus: float, threads: int, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ray's options for an actor. cpus: CPUs to request. threads: of OpenMP. variables: environment variables.

        max_restarts is 0, because Ray could not restore an actor's state.
        """
        return {
            "num_cpus": cpus,
            "num_gpus": self.gpus,
            "memory": self.memory,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), **(variables or {})}},
        }


def check_workers(workers: int, needs: ActorResources) -> None:
    """UserError unless the cluster has room for all workers, each with what it needs, at the same time."""
    check([needs.bundle] * workers, f"workers={workers} of threads={needs.cpus:g}")


def check(bundles: Sequence[Bundle], asked: str) -> None:
    """UserError unless every bundle of resources fits on a node, and all of them fit in the cluster at once.

    Runs inside a Ray session. bundles: resources of each actor or task, such as {"CPU": 2, "GPU": 1}. asked: the
    options that they come from, for the error. With an autoscaler, which may add nodes, it only warns.
    """
    needed = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    refusal = _refusal(nodes(), needed, asked)
    if refusal is None:
        return
    if not grows():
        raise UserError(refusal)
    _LOG.warning("%s; waiting for the autoscaler to add nodes", refusal)


def nodes() -> list[Bundle]:
    """Total resources of each node that is alive; inside a Ray session."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _refusal(node_resources: Sequence[Bundle], bundles: Sequence[Bundle], asked: str) -> str | None:
    count = len(node_resources)
    has = f"the cluster has {count} node{'s' * (count != 1)}: {_amounts(_sum(node_resources), bundles)}"
    for bundle in bundles:
        if not any(_fits(bundle, node) for node in node_resources):
            largest = {name: max((node.get(name, 0.0) for node in node_resources), default=0.0) for name in bundle}
            need = _amounts(bundle, [bundle])
            return f"{has}, no more than {_amounts(largest, [bundle])} on one; {asked} need {need} each"
    if packs(node_resources, bundles):
        return None
    needed = _sum(bundles)
    # The sum is sufficient, but the resources are spread over too many nodes.
    each = f", {_amounts(bundles[0], bundles[:1])} each" if _fits(needed, _sum(node_resources)) else ""
    return f"{has}; {asked} need {_amounts(needed, bundles)}{each}"


def packs(node_resources: Sequence[Bundle], bundles: Sequence[Bundle]) -> bool:
    """Whether all bundles fit on the nodes, if they are placed one by one with the largest first."""
    free: list[dict[str, float]] = [dict(node) for node in node_resources]
    for bundle in sorted(bundles, key=lambda bundle: (bundle.get("GPU", 0), bundle.get("CPU", 0)), reverse=True):
        node = next((node for node in free if _fits(bundle, node)), None)
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
    """Text of the amounts of CPUs and of all other resources in `wanted`: `4 CPUs and 0 GPUs`."""
    names = ["CPU", *(name for name in _sum(wanted) if name != "CPU")]
    return " and ".join(_amount(amounts.get(name, 0), name) for name in names)


def _amount(amount: float, name: str) -> str:
    return f"{amount:g} {name}{'s' * (name in ('CPU', 'GPU') and amount != 1)}"


def grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster; inside a Ray session.

    An autoscaler's configuration names its node types. Without one, Ray makes up a type for every node.
    """
    return any(_DEFAULT_TYPE.fullmatch(node_type) is None for node_type in _node_types())


def _node_types() -> list[str]:
    """Node types that the autoscaler's monitor reports; empty if a driver started Ray."""
    # These interfaces are not public, but `ray status` uses them in every version of Ray that hasten supports.
    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
    # Nothing is reported in the first seconds of a cluster.
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report")
    return list(report["active_nodes"]) if report else []
