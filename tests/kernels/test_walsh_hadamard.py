"""Hadamard matrices and the fast transform."""

import pytest
import torch

from hasten.kernels.walsh_hadamard import factors, hadamard_matrix, walsh_hadamard


@pytest.mark.parametrize("order", [12, 20, 28])
def test_rows_of_a_hadamard_matrix_are_orthogonal(order):
    matrix = hadamard_matrix(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_four_numbers_are_transformed_as_by_sylvesters_matrix():
    values, scale = walsh_hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert values.tolist() == [[5.0, -1.0, -2.0, 0.0]]
    assert scale is None


@pytest.mark.parametrize("columns", [8, 24, 80, 56])
def test_the_transform_is_a_product_with_an_orthogonal_matrix(columns):
    matrix, _ = walsh_hadamard(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns, dtype=torch.float64))
    order, power = factors(columns)
    sylvester = torch.ones(1, 1)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    torch.testing.assert_close(matrix.float(), torch.kron(hadamard_matrix(order), sylvester) / columns**0.5)


@pytest.mark.parametrize("columns", [0, 6, 36, 44])
def test_sizes_without_such_a_matrix_are_refused(columns):
    with pytest.raises(ValueError, match=f"power of 2, or 12, 20 or 28 times one, got {columns}"):
        walsh_hadamard(torch.zeros(1, columns))
