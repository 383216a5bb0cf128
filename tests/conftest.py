"""What all tests share: one thread, and one Ray for the whole session, started when the first test asks for it."""

import os
import sys
from collections.abc import Iterator

import pytest

# Before torch is imported: threads that wait for each other on a busy machine make tests take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from hasten.cluster.runtime.session import session

    with session(None, cpus=4):
        yield


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Gradients are back after each test: an actor made without Ray switches them off in the tests' own process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)
