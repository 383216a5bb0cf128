"""A layer with correlated inputs of very different size, as in trained models."""

import pytest
import torch

from hasten.accel.compression.calibration.statistics import Hessian


@pytest.fixture(scope="session")
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=generator)
    sizes = torch.logspace(-1, 1, 128)
    return torch.randn(1024, 128, generator=generator) @ mix * sizes


@pytest.fixture(scope="session")
def weight() -> torch.Tensor:
    return (torch.randn(48, 128, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16()


@pytest.fixture
def hessian(inputs) -> Hessian:
    hessian = Hessian(128)
    hessian.add(inputs)
    return hessian
