"""A Ray session: joined by its address, or started on this machine and ended with the job."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accel.errors import UserError

_LOG = logging.getLogger(__name__)


@contextmanager
def session(address: str | None, cpus: int) -> Iterator[None]:
    """Ray for the time of the block; one that is already running in this process is used and left running.

    address: of a cluster, `auto` for the one that RAY_ADDRESS or this machine names, None to start Ray here. cpus: what
    the job's actors need together; a local Ray offers that many even where the machine has fewer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would copy the working folder to every node and hide GPUs from actors that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"address={address!r} does not answer ({reason}): start Ray there with `ray start --head`, "
                f"or leave address out to start it on this machine"
            ) from None
    else:
        _start_here(max(cpus, os.cpu_count() or 1))
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(cpus: int) -> None:
    import ray

    _LOG.info("starting Ray on this machine")
    for attempt in (1, 2):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception:
            # On a busy machine the start can outlast a fixed wait inside Ray.
            ray.shutdown()
            if attempt == 2:
                raise
            _LOG.warning("Ray did not start in time; trying once more")
