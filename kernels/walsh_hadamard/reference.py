"""Hadamard matrices, and the transform in plain torch."""

from functools import cache

import torch
from torch import Tensor

from hasten.kernels.row_quantization import quantize_rows

# Order of the matrix for each odd factor of the number of columns.
_ORDERS = {1: 1, 3: 12, 5: 20, 7: 28}


def factors(columns: int) -> tuple[int, int]:
    """Orders m and 2**k of the two matrices for this number of columns. ValueError if there is no such product."""
    odd = columns // (columns & -columns) if columns > 0 else 0
    order = _ORDERS.get(odd)
    if order is None or columns % order:
        raise ValueError(f"the number of columns must be a power of 2, or 12, 20 or 28 times one, got {columns}")
    return order, columns // order


@cache
def hadamard_matrix(order: int) -> Tensor:
    """Hadamard matrix (order, order) float32 of 1 and -1, for orders 1, 12, 20 and 28.

    Source: Paley 1933, "On orthogonal matrices".
    """
    if order == 1:
        return torch.ones(1, 1)
    # Orders q + 1 for primes q of the form 4 n + 3, and 2 (q + 1) for 4 n + 1.
    first = order != 28
    prime = order - 1 if first else order // 2 - 1
    index = torch.arange(prime)
    squares = set((index[1:] ** 2 % prime).tolist())
    characters = torch.tensor([0] + [1 if number in squares else -1 for number in range(1, prime)])
    border = torch.ones(1, prime)
    jacobsthal = characters[(index[:, None] - index) % prime].float()
    bordered = torch.cat([torch.zeros(1, 1), border], 1)
    bordered = torch.cat([bordered, torch.cat([-border.T if first else border.T, jacobsthal], 1)])
    if first:
        return torch.eye(order) + bordered
    pair, diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(bordered, pair) + torch.kron(torch.eye(prime + 1), diagonal)


def walsh_hadamard(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """See hasten.kernels.walsh_hadamard.walsh_hadamard."""
    rows, columns = x.shape
    order, power = factors(columns)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(rows, order, power)
    wide = torch.einsum("nip,ij->njp", wide, hadamard_matrix(order).to(wide))
    step = 1
    while step < power:
        one, other = wide.reshape(rows, -1, 2, step).unbind(2)
        wide = torch.stack([one + other, one - other], 2)
        step *= 2
    transformed = wide.reshape(rows, columns) / columns**0.5
    return (transformed.to(x.dtype), None) if dtype is None else quantize_rows(transformed, dtype)
