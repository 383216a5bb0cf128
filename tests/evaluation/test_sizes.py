import math
from pathlib import Path

import pytest
from safetensors import safe_open

from hasten.accel.evaluation.sizes import sizes
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

GROUP = 32


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("plain") / "model", "llama")


def stored(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the folder's files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found.update({name: tensors.get_tensor(name).nbytes for name in tensors.keys()})  # noqa: SIM118
    return found


def test_an_uncompressed_model_takes_the_bits_of_its_dtype(plain: Path) -> None:
    found = sizes(Checkpoint(plain))
    bits = 8 * Checkpoint(plain).dtype("model.norm.weight").itemsize
    assert found.bits_per_weight == found.model_bits_per_weight == bits
    assert found.weights == 0
    assert found.disk_bytes == sum(file.stat().st_size for file in plain.glob("*.safetensors"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_scales_and_zero_points_of_quantized_layers_are_counted(
    plain: Path, tmp_path: Path, symmetric: bool
) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    folder = tiny.save_packed(
        tmp_path / "packed", plain, [{"targets": ["Linear"], "weights": weights}], ignore=["lm_head"]
    )
    found = sizes(Checkpoint(folder))
    scale_bits = 8 * Checkpoint(folder).dtype("model.layers.0.mlp.up_proj.weight").itemsize
    # Four bits a weight, and for every group a scale and, where asymmetric, a zero point of four bits.
    assert found.bits_per_weight == 4 + (scale_bits + (0 if symmetric else 4)) / GROUP
    parts = stored(folder)
    assert found.total_bytes == sum(size for name, size in parts.items() if not name.endswith("weight_shape"))
    assert found.total_weights == sizes(Checkpoint(plain)).total_weights
    assert found.metrics()["bytes"] > sum(parts.values())  # the headers too
    assert found.bits_per_weight < found.model_bits_per_weight < 8 * 4


def test_layers_left_alone_do_not_count_as_quantized(plain: Path, tmp_path: Path) -> None:
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    folder = tiny.save_packed(
        tmp_path / "packed", plain, [{"targets": ["re:.*down_proj"], "weights": weights}], ignore=["lm_head"]
    )
    found = sizes(Checkpoint(folder))
    shape = Checkpoint(plain).shape("model.layers.0.mlp.down_proj.weight")
    assert found.weights == 2 * math.prod(shape)
