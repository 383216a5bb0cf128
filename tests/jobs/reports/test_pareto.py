from itertools import product

from hasten.jobs.report.pareto import front


def test_the_front_of_six_settings_worked_by_hand():
    # (divergence, bytes): 0 and 5 are the two ends; 1 lies between them; 2 is beaten by 1 in both, 3 by 1 at the same
    # bytes, 4 by 5 at the same divergence.
    points = [(0.1, 800.0), (0.3, 400.0), (0.4, 500.0), (0.5, 400.0), (0.9, 300.0), (0.9, 200.0)]
    assert front(points, [1, 1]) == [0, 1, 5]


def test_more_is_better_where_the_sign_says_so():
    # (divergence, tokens a second): 1 is as quick as 0 and worse, 2 the quickest.
    assert front([(0.1, 50.0), (0.2, 50.0), (0.3, 90.0)], [1, -1]) == [0, 2]


def test_equal_points_are_on_the_front_together():
    assert front([(1.0, 1.0), (1.0, 1.0), (2.0, 2.0)], [1, 1]) == [0, 1]


def test_a_single_point_is_a_front():
    assert front([(3.0, 1.0)], [1, 1]) == [0]


def test_points_on_the_front_are_not_dominated():
    points = [(a * 7 % 5, b * 3 % 4, (a + b) % 3) for a, b in product(range(6), range(5))]
    unbeaten = [
        index
        for index, mine in enumerate(points)
        if not any(other != mine and all(x <= y for x, y in zip(other, mine, strict=True)) for other in points)
    ]
    assert 0 < len(unbeaten) < len(points)
    assert front(points, [1, 1, 1]) == unbeaten
