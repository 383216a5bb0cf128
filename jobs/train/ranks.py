"""The ranks of `hasten train`: what they need, the checks of their options, and the Ray session that they run in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.accel.training.trainer import TrainSettings
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.arithmetic import gpus_per_worker
from hasten.jobs.descriptors.descriptor import Needs
from hasten.jobs.descriptors.needs import of_process
from hasten.jobs.train.options import TrainConfig


def in_group(config: TrainConfig) -> bool:
    """Whether ranks train, instead of this process."""
    return config.train.ranks > 1 or config.train.zero > 0


def rank_needs(config: TrainConfig) -> ActorResources:
    """Resources of each rank."""
    return ActorResources(config.threads, gpus_per_worker(config.device))


def needs(config: TrainConfig) -> Needs:
    """Resources of the run: the target is recorded in its own process; then the ranks train."""
    own = of_process(config)
    if not in_group(config):
        return own
    return Needs(own.cpus, own.gpus, own.threads, (rank_needs(config).bundle,) * config.train.ranks)


def check_ranks(config: TrainConfig, settings: TrainSettings) -> None:
    """UserError unless each rank can have an equal part of every micro-batch, and DeepSpeed is installed."""
    if not in_group(config):
        return
    # It imports Ray.
    from hasten.cluster.runtime.process_group import require_deepspeed

    ranks = config.train.ranks
    if settings.micro_batch % ranks:
        name = "batch" if config.train.micro_batch is None else "micro_batch"
        raise UserError(
            f"train.ranks={ranks} must divide train.{name}={settings.micro_batch}, the windows that run at once on all "
            "ranks together"
        )
    require_deepspeed(f"train.ranks={ranks} with train.zero={config.train.zero}")


@contextmanager
def ranks_session(config: TrainConfig, reads: Mapping[str, Path], writes: Mapping[str, Path]) -> Iterator[None]:
    """Context with a Ray session that has room for the ranks, whose nodes see these paths; none without ranks."""
    if not in_group(config):
        yield
        return
    from hasten.cluster.runtime.process_group import check_group
    from hasten.cluster.runtime.session import session
    from hasten.cluster.runtime.visibility import check

    # Not as many CPUs as the ranks ask for: on too few cores, ranks only wait for each other.
    with session(config.address, cpus=1):
        check_group(config.train.ranks, rank_needs(config), "train.ranks")
        check(reads, writes)
        yield
