"""The resources of `hasten decode` on a cluster."""

from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.descriptors.descriptor import Needs
from hasten.jobs.descriptors.needs import of_workers


def needs(config: DecodeConfig) -> Needs:
    """Resources of the workers and, if several workers may share drafters, of the actors that run these."""
    needed = of_workers(config)
    if config.workers == 1 or config.placement == "private":
        return needed
    return needed._replace(actors=(*needed.actors, *({"CPU": 1.0},) * config.drafter_actors))
