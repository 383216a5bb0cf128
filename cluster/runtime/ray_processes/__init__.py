"""Ray on this machine without those of its own processes that hasten does not use."""

from hasten.cluster.runtime.ray_processes.patch import fewer_processes

__all__ = ["fewer_processes"]
