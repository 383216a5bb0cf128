"""Workers of a Ray that runs on this machine alone, forked from one process that has imported their modules.

Ray starts each worker as a new Python, which takes about five CPU seconds to import torch, transformers and hasten, and
holds its own copy of what they make. Forked workers start at once and share it.

    with forked_workers():
        ray.init(...)
"""

from hasten.cluster.runtime.prefork.patch import can_fork, forked_workers

__all__ = ["can_fork", "forked_workers"]
