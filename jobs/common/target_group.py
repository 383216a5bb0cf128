"""The division of a model over the ranks of a group, by the options of a job, checked before Ray starts."""

from pathlib import Path

from hasten.accel.costs.ranks import Ranks
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


def check_options(group: TargetGroup, path: str = "auto") -> None:
    """UserError if options contradict each other. path: the option of that name of `hasten decode`."""
    if group.offload is not None and group.mode == TENSOR_PARALLEL:
        raise UserError(
            f"target_group.offload={group.offload} is an option of target_group.mode=zero3: tensor parallelism keeps "
            "the weights on the devices"
        )
    if is_divided(group) and path in FAST_PATHS:
        raise UserError(f"path={path} runs in one process: give path=auto or transformers with target_group")


def check_block_options(group: TargetGroup, calibrates: bool = False) -> None:
    """UserError if options contradict each other, for a job that runs a model block by block.

    calibrates: whether what is written must not depend on the ranks.
    """
    check_options(group)
    if group.offload not in (None, "cpu"):
        raise UserError(
            f"target_group.offload={group.offload}: a folder is for hasten decode; here a rank holds its part of one "
            "block, on the device (null) or in main memory (cpu)"
        )
    if calibrates and is_divided(group) and group.mode == TENSOR_PARALLEL:
        raise UserError(
            "target_group.mode=tensor_parallel adds up parts of a layer's output in another order, so that the "
            "compressed weights would depend on the number of ranks: use target_group.mode=zero3"
        )


def block_division(group: TargetGroup, calibrates: bool = False) -> Division | None:
    """The division that the options describe for a job that runs a model block by block; errors as above."""
    check_block_options(group, calibrates)
    return chosen_division(group)


def planned_ranks(group: TargetGroup, *architectures: Architecture) -> Ranks | None:
    """The division for a plan, None for one process; UserError if the layers of a model cannot be divided so."""
    if not is_divided(group):
        return None
    if group.mode == TENSOR_PARALLEL:
        for architecture in architectures:
            check_division(architecture, group.size, "target_group.size")
    return Ranks(group.size, group.mode != TENSOR_PARALLEL, group.offload)


def chosen_division(group: TargetGroup, path: str = "auto") -> Division | None:
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
