"""What `hasten decode` takes of a cluster."""

from hasten.jobs.common.descriptor import Needs
from hasten.jobs.common.needs import of_workers
from hasten.jobs.decode.options import DecodeConfig


def needs(config: DecodeConfig) -> Needs:
    """Of the workers, and of drafters in actors of their own where several workers may share them."""
    needed = of_workers(config)
    if config.workers == 1 or config.placement == "private":
        return needed
    return needed._replace(actors=(*needed.actors, *({"CPU": 1.0},) * config.drafter_actors))
