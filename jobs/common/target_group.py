"""The division of a target over the ranks of a group, by the options of a job, checked before Ray starts."""

from pathlib import Path

from hasten.accel.decoding.targets.base import FAST_PATHS
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.assembled import check_division
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.divided_model import TENSOR_PARALLEL, Division
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import group_needs, require_deepspeed
from hasten.jobs.common.schema import TargetGroup


def is_divided(group: TargetGroup) -> bool:
    """Whether a target is divided: over several ranks, or over a device and what zero3 offloads to."""
    return group.size > 1 or group.offload is not None


def check_options(group: TargetGroup, path: str) -> None:
    """UserError if options contradict each other. path: the option of that name."""
    if group.offload is not None and group.mode == TENSOR_PARALLEL:
        raise UserError(
            f"target_group.offload={group.offload} is an option of target_group.mode=zero3: tensor parallelism keeps "
            "the weights on the devices"
        )
    if is_divided(group) and path in FAST_PATHS:
        raise UserError(f"path={path} runs in one process: give path=auto or transformers with target_group")


def chosen_division(group: TargetGroup, path: str) -> Division | None:
    """The division that the options describe, None for one process; UserError without DeepSpeed, and see above."""
    check_options(group, path)
    if not is_divided(group):
        return None
    require_deepspeed(f"target_group.size={group.size}")
    # Ranks have another current folder.
    offload = group.offload if group.offload in (None, "cpu") else str(Path(group.offload).absolute())
    return Division(group.size, group.mode, offload)


def check_target(target: Path, division: Division | None) -> None:
    """UserError if a checkpoint's layers cannot be divided so, or its family is unknown. target: its folder."""
    if division is None:
        return
    architecture = Architecture(Checkpoint(target))
    if division.mode == TENSOR_PARALLEL:
        check_division(architecture, division.size, "target_group.size")


def with_ranks(group: TargetGroup, needs: ActorResources) -> ActorResources:
    """Resources of all ranks of a worker, for the resources of one process."""
    return group_needs(group.size, needs) if is_divided(group) else needs
