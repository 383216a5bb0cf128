"""What all tests share: one Ray for the whole session, started when the first test asks for it."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from cluster.session import session

    with session(None, cpus=4):
        yield
