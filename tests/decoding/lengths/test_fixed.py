"""The fixed length."""

import pytest

from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError


def never():
    raise AssertionError("a fixed length measures nothing")


def test_every_pass_gets_the_same_number_whatever_the_limit_and_all_of_it_is_verified():
    length = Fixed(5).start(never, limit=3)
    tree = DraftTree.chain([1, 2, 3, 4, 5])
    assert [length.budget(sequences) for sequences in (1, 2, 8)] == [5, 5, 5]
    assert length.max_nodes == 5
    assert length.select([tree], 1, [False])[0] is tree


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match="tokens=-1 is wrong: expected 0 or more"):
        Fixed(-1)
