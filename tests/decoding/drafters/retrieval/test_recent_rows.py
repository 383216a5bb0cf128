"""A table of recent rows drops the oldest one, and gives what was put since it was last asked."""

from hasten.accel.decoding.drafters.retrieval.recent_rows import RecentRows


def test_beyond_its_bound_the_row_that_was_not_put_for_longest_is_dropped():
    rows = RecentRows()
    for key in "abacd":
        rows.put(key, key.upper(), 3)
    assert list(rows.items()) == [("a", "A"), ("c", "C"), ("d", "D")]


def test_changes_are_the_rows_that_were_put_since_the_last_call():
    rows = RecentRows()
    rows.put("a", 1, 3)
    rows.put("b", 2, 3)
    assert list(rows.changes(False).items()) == [("a", 1), ("b", 2)]
    assert list(rows.changes(False)) == []
    rows.put("c", 3, 3)
    rows.put("a", 4, 3)
    assert list(rows.changes(False).items()) == [("c", 3), ("a", 4)]
    for key in "defg":  # the first of them has been dropped again
        rows.put(key, 5, 3)
    assert list(rows.changes(False)) == ["e", "f", "g"]
    assert list(rows.changes(True)) == ["e", "f", "g"]
