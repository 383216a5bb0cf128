"""The tiny model from which candidates are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.compression.search.noisy import BLOCKS
from tests.models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
