"""Shapes of trees: the most_accepted first, and every parent before its children."""

from hasten.accel.decoding.drafters.template import by_acceptance, most_accepted


def test_the_most_accepted_paths_by_hand():
    # Rates 1/2 and 1/4: 0 has 1/2; 1 and 00 have 1/4; 01, 10 and 000 have 1/8.
    assert most_accepted(3, (0.5, 0.25), depth=3) == [(0,), (0, 0), (1,)]
    assert set(most_accepted(6, (0.5, 0.25), depth=3)[3:]) == {(0, 1), (1, 0), (0, 0, 0)}


def test_depth_is_a_limit_and_all_paths_may_be_too_few():
    assert most_accepted(99, (0.5, 0.25), depth=1) == [(0,), (1,)]


def test_ordered_paths_know_where_their_parents_are():
    assert by_acceptance([(0,), (1,), (0, 0), (0, 1)], (0.5, 0.25)) == [
        (-1, (0,)),
        (-1, (1,)),
        (0, (0, 0)),
        (0, (0, 1)),
    ]
    assert by_acceptance([(1,), (1, 0), (0,)], (0.5, 0.25)) == [(-1, (0,)), (-1, (1,)), (1, (1, 0))]
