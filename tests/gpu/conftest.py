"""Checks on a GPU. They import nothing but accel and kernels: a GPU machine need not have Ray, Hydra or MLflow.

HASTEN_TEST_DEVICE names the device, `cuda` by default. With `cpu` the same checks run without a GPU, Triton kernels in
Triton's interpreter, so that they are known to work before GPU time is spent on them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

DEVICE = os.environ.get("HASTEN_TEST_DEVICE", "cuda")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later


@pytest.fixture(scope="session")
def device() -> str:
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; HASTEN_TEST_DEVICE=cpu runs these checks without one")
    return DEVICE


@pytest.fixture(autouse=True)
def unchanged_precision(device: str) -> Iterator[None]:
    """No test leaves float32 products in tf32, which the statistics of bfloat16 inputs use for a while."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.fixture(scope="session")
def folder() -> Path:
    """Checkpoint of the embedded target."""
    return embedded.path("target")


@pytest.fixture(scope="session")
def token_ids(folder: Path) -> torch.Tensor:
    """Token ids (12, 128) of Python's standard library."""
    from tokenizers import Tokenizer

    from hasten.accel.data.library import library_files, library_root, read_texts

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream: list[int] = []
    root = library_root()
    for text in read_texts(root, library_files("train", root)):
        stream += tokenizer.encode(text).ids
        if len(stream) >= 12 * 128:
            break
    return torch.tensor(stream[: 12 * 128]).view(12, 128)


@pytest.fixture(scope="session")
def on_cpu(folder: Path) -> Architecture:
    return Architecture(Checkpoint(folder))


@pytest.fixture(scope="session")
def on_device(folder: Path, device: str) -> Architecture:
    return Architecture(Checkpoint(folder), device=device)
