"""The outline of a folder with only config.json has the names, shapes and dtypes of the checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch

from hasten.accel.costs.outline import Outline, open_checkpoint
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from tests.models import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_outline_has_the_names_and_shapes_of_the_saved_checkpoint(family, tmp_path):
    whole = Checkpoint(tiny.save(tmp_path / "whole", family, dtype=torch.bfloat16))
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "config")
    outline = open_checkpoint(tmp_path / "config")
    assert isinstance(outline, Outline)
    known, planned = Architecture(whole), Architecture(outline)
    assert planned.num_blocks == known.num_blocks
    for block in [*range(known.num_blocks), None]:
        names = known.outer_tensors() if block is None else known.block_tensors(block)
        assert (planned.outer_tensors() if block is None else planned.block_tensors(block)) == names
        assert [outline.shape(name) for name in names] == [whole.shape(name) for name in names]
        assert [outline.nbytes(name) for name in names] == [whole.nbytes(name) for name in names]


def test_llama_405b_is_known_from_its_config_alone():
    outline = open_checkpoint(Path(__file__).parent / "llama_405b")
    # 126 blocks of 16384 x (2 x 16384 + 2 x 1024 + 3 x 53248) and two norms; embedding, head and the last norm.
    block = 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248) + 2 * 16384
    parameters = 126 * block + 2 * 128256 * 16384 + 16384
    assert parameters == 405_853_388_800
    assert sum(outline.nbytes(name) for name in outline.names) == 2 * parameters


def test_a_config_of_a_compressed_checkpoint_is_no_outline(tmp_path):
    tiny.save(tmp_path / "whole", "llama")
    text = (tmp_path / "whole" / "config.json").read_text().replace("{", '{"quantization_config": {"a": 1},', 1)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(text)
    with pytest.raises(UserError, match="is compressed and has no safetensors"):
        open_checkpoint(tmp_path / "config")


def test_of_a_hub_name_no_weights_are_downloaded_where_shapes_are_enough(tmp_path, monkeypatch):
    asked = []

    def download(name, **patterns):
        asked.append(patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name", weights=False) == tmp_path
    assert resolve("org/name") == tmp_path
    assert ["*.safetensors" in patterns["ignore_patterns"] for patterns in asked] == [True, False]
