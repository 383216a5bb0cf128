import pytest
import torch

from hasten.accel.costs.model import Model
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A tiny llama in bfloat16."""
    return tiny.save(tmp_path_factory.mktemp("plan") / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="package")
def model(folder):
    """The same model as estimates use it, running in float32."""
    return Model(Architecture(Checkpoint(folder)), torch.float32)
