"""Statistics of groups of columns."""

import pytest
import torch

from hasten.kernels.group_statistics import group_statistics


def test_each_group_has_its_own_statistics():
    found = group_statistics(torch.tensor([[1.0, -3.0, 2.0, 5.0]]), 2)
    assert {name: values.tolist() for name, values in found._asdict().items()} == {
        "minimum": [[-3.0, 2.0]],
        "maximum": [[1.0, 5.0]],
        "absmax": [[3.0, 5.0]],
        "total": [[-2.0, 7.0]],
        "squares": [[10.0, 29.0]],
    }


def test_groups_that_do_not_divide_the_columns_are_refused():
    with pytest.raises(ValueError, match="group_size=3 must divide the 4 columns"):
        group_statistics(torch.ones(1, 4), 3)
