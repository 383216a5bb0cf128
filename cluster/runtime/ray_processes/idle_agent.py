"""Stands in for the agent of Ray's dashboard: it does nothing, and ends with Ray, which would end with its agent.

Run by path, without site packages.
"""

import os
import time

_CHECK_SECONDS = 1.0


def main() -> None:
    """Wait for the parent's end."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)


if __name__ == "__main__":
    main()
