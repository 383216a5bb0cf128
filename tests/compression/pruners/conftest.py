"""A layer with correlated inputs of very different size, as in trained models."""

import pytest
import torch

from hasten.accel.compression.calibration.statistics import Hessian

ROWS, COLUMNS = 48, 198  # of columns neither whole bytes of mask nor whole blocks


@pytest.fixture(scope="session")
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    sizes = torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]
    return torch.randn(1024, COLUMNS, generator=generator) @ mix * sizes


@pytest.fixture(scope="session")
def weight() -> torch.Tensor:
    return (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16()


@pytest.fixture
def hessian(inputs) -> Hessian:
    return hessian_of(inputs)


def hessian_of(inputs: torch.Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian
