"""Files of an output folder."""

import torch
from safetensors.torch import save_file

from hasten.accel.outputs.resumable import write_whole


def test_a_file_has_the_mode_that_new_files_get_whatever_its_writer_would_give(tmp_path):
    (tmp_path / "other").write_text("")
    write_whole(tmp_path / "model.safetensors", lambda path: save_file({"w": torch.ones(1)}, path))
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"
