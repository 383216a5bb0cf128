"""What the tests of jobs share: an empty folder to run in, and a tiny checkpoint with tokens for it."""

import os
import shutil

import numpy as np
import pytest
import torch

from hasten.cluster.tracking import store
from tests.models import tiny


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    """A checkpoint of two blocks, or of the test module's BLOCKS, and beside it token ids."""
    folder = tmp_path_factory.mktemp("llama")
    np.save(folder / "tokens.npy", tiny.tokens(8, 16).numpy())
    blocks = getattr(request.module, "BLOCKS", 2)
    return tiny.save(folder / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=blocks)


@pytest.fixture(autouse=True)
def copied_tables(database, monkeypatch):
    """Jobs that run in this process copy MLflow's tables, in place of a second and a half for making them."""

    def copied(file):
        if not file.exists():
            unfinished = file.with_name(f".{file.name}.{os.getpid()}")
            shutil.copy(database, unfinished)
            os.replace(unfinished, file)

    monkeypatch.setattr(store, "make_database", copied)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
