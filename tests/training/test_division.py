"""Means and random numbers of a divided batch are those of the whole one."""

import torch

from hasten.accel.training.division import Division, divided, mean, rand


def test_the_average_of_unequal_parts_is_the_mean_of_the_whole():
    # Losses 1, 2, 3 on the first process and 10 on the second: the mean is 4, and not that of 2 and 10.
    total = torch.tensor(4.0)
    found = []
    for rank, losses in enumerate(([1.0, 2.0, 3.0], [10.0])):
        with divided(Division(rank, 2, lambda own: total)):
            found.append(mean(torch.tensor(losses).sum(), len(losses)))
    assert sum(found) / 2 == 4.0
    assert mean(torch.tensor(6.0), 3) == 2.0
    assert mean(torch.tensor(0.0), 0) == 0.0


def test_random_numbers_are_those_of_the_own_rows():
    torch.manual_seed(3)
    whole = rand(4, 5, torch.device("cpu"))
    parts = []
    for rank in range(2):
        torch.manual_seed(3)
        with divided(Division(rank, 2)):
            parts.append(rand(2, 5, torch.device("cpu")))
    assert torch.equal(torch.cat(parts), whole)
    assert Division(1, 2).part([7, 8, 9, 10]) == [9, 10]
