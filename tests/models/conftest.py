"""Checkpoints that several tests of this folder read, and none writes to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny

FOUR_BITS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
THREE_BITS = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function (family, sharded, tied) that returns a tiny checkpoint and makes it at the first call."""
    made: dict[tuple[object, ...], Path] = {}

    def make(family: str, sharded: bool = False, tied: bool = False) -> Path:
        key = (family, sharded, tied)
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[key] = tiny.save(folder, family, sharded, tie_word_embeddings=tied)
        return made[key]

    return make


def _packed(folder: Path, source: Path, symmetric: bool) -> Path:
    schemes = [
        {"targets": ["Linear"], "weights": {**FOUR_BITS, "symmetric": symmetric}},
        {"targets": ["re:.*down_proj"], "weights": THREE_BITS},
    ]
    return tiny.save_packed(folder, source, schemes, ignore=["lm_head", "model.layers.0.self_attn.o_proj"])


@pytest.fixture(scope="session")
def packed(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in 4 bits, with down projections in 3 bits and one layer not quantized."""
    return _packed(tmp_path_factory.mktemp("packed") / "model", checkpoints("llama"), symmetric=True)


@pytest.fixture(scope="session")
def packed_with_zeros(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, the 4-bit layers with zero points, which compressed-tensors 0.20 cannot load into transformers."""
    return _packed(tmp_path_factory.mktemp("packed") / "model", checkpoints("llama"), symmetric=False)
