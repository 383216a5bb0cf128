"""`hasten bench cache_speed`."""

import json

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.jobs.bench import cache_speed


def test_every_cache_is_beside_the_dense_one_at_every_batch(tmp_path):
    threads = torch.get_num_threads()
    document = tmp_path / "table.md"
    config = cache_speed.Config(
        context=200,
        batches=[1, 2],
        caches=["kivi bits=4", "snapkv cache_budget=0.5"],
        tokens=4,
        rounds=1,
        document=str(document),
        run_dir=str(tmp_path / "run"),
    )
    try:
        report = json.loads(cache_speed.run(config).read_text())
    finally:
        torch.set_num_threads(threads)
    text = document.read_text()
    for batch in (1, 2):
        for name in ("dense", "kivi bits=4", "snapkv cache_budget=0.5"):
            assert text.count(f"| {batch} | `{name}` |") == 1
            # A compression is due after 32 tokens.
            assert len(report["rows"][str(batch)][name]["seconds"]) == 32
        assert report["metrics"][f"batch_{batch}_kivi_bits_4_bytes_share"] < 0.6
        assert report["metrics"][f"batch_{batch}_dense_speed"] == 1


@pytest.mark.parametrize("words", ["kivy bits=4", "kivi 4"])
def test_a_cache_that_is_none_is_refused(tmp_path, words):
    with pytest.raises(UserError, match="is wrong: expected NAME OPTION=VALUE"):
        cache_speed.run(
            cache_speed.Config(caches=[words], run_dir=str(tmp_path / "run"), document=str(tmp_path / "d.md"))
        )
