"""A Ray that does not start."""

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime import session


def test_a_ray_that_starts_twice_in_vain_is_refused_in_one_line(monkeypatch):
    starts = []

    def init(**options):
        starts.append(options)
        raise RuntimeError("The node timed out\nduring startup")

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session, "make_token", lambda: None)
    with pytest.raises(UserError, match=r"does not start on this machine \(The node timed out during startup\)"):
        session._start_here(2, None)
    assert len(starts) == 2
