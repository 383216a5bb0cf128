import sys

import pytest
import torch
from transformers import LlamaConfig

from hasten.accel.errors import UserError
from hasten.jobs.bench import compress
from hasten.jobs.bench.measurements.quality import Quality
from hasten.jobs.bench.measurements.random_checkpoint import write_random_checkpoint
from hasten.jobs.bench.processes import runs
from hasten.jobs.bench.processes.runs import Outcome, check_peer, digest, hasten_compress
from hasten.jobs.bench.processes.watch import Peak, Usage


def outcome(cpu_seconds=1.0, seconds=2.0, digest="a"):
    """A run that cost this much."""
    return Outcome(
        "folder", seconds, cpu_seconds, seconds + 1, cpu_seconds + 1, 300_000_000, 11_000_000, digest, "0.14"
    )


GPTQ = compress.Row(compress.GPTQ, 4, (outcome(9.0), outcome(8.0)), 10.0, 0.004)
PEERS = [
    compress.Row("llm-compressor GPTQ, auto", 4, (outcome(40.0),), 10.1, 0.005),
    compress.Row("llm-compressor GPTQ, float32", 4, (outcome(20.0),), 10.2, 0.008),
]


def test_cost_and_divergence_are_held_against_the_best_peer():
    found = compress._metrics([GPTQ, *PEERS], {})
    assert found["cpu_seconds_w4"] == 8.0  # the quicker of two runs
    assert found["cpu_ratio_w4"] == pytest.approx(8 / 20)
    assert found["kl_ratio_w4"] == pytest.approx(0.004 / 0.005)
    assert found["same_bytes_w4"] is True


def test_peers_at_other_bits_are_not_compared_with():
    assert (
        compress._metrics([GPTQ, compress.Row(PEERS[0].method, 3, PEERS[0].runs, 10.0, 0.1)], {})["cpu_ratio_w4"]
        is None
    )


def test_one_other_byte_in_one_run_is_told():
    runs = (outcome(digest="a"), outcome(digest="a"), outcome(digest="b"))
    assert compress.Row(compress.GPTQ, 4, runs).same_bytes is False
    assert compress.Row(compress.GPTQ, 4, runs[:1]).same_bytes is None


def test_speed_up_is_wall_time_against_the_first():
    found = compress._metrics([], {1: outcome(seconds=6.0), 2: outcome(seconds=3.0)})
    assert found["speedup_2_workers"] == 2.0
    assert found["calibration_seconds_2_workers"] == 3.0


def test_a_peer_that_was_not_run_has_a_row_that_says_so():
    row = compress.Row(PEERS[0].method, 2)
    cells = compress._cells(row, [GPTQ, row])
    assert cells[:2] == ["W2 llm-compressor GPTQ, auto", "not run"]
    assert len(cells) == len(compress._cells(GPTQ, [GPTQ]))


def test_an_unchanged_copy_has_no_divergence_and_perplexity_counts_all_windows(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_random_checkpoint(tmp_path, LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    windows = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
    found = Quality(tmp_path, windows, 2).measure(tmp_path)
    assert found["kl_divergence"] == 0
    assert found["tokens"] == 6 * 15
    first = Quality(tmp_path, windows[:2], 2).measure(tmp_path)
    assert found["perplexity_original"] == pytest.approx(first["perplexity"])


def test_names_and_bytes_of_files_make_the_digest(tmp_path):
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    a, b, c, d = (digest(tmp_path / folder) for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    (tmp_path / "a" / ".hasten").mkdir()
    (tmp_path / "a" / ".hasten" / "notes.json").write_text("{}")
    assert digest(tmp_path / "a") == b


def test_a_mistake_in_the_options_comes_back_as_one_line(tmp_path):
    with pytest.raises(UserError, match="bits=9"):
        hasten_compress(tmp_path, {"bits": 9})


def test_an_outcome_is_kept_for_the_same_options_and_commit(tmp_path, monkeypatch):
    started = []

    def job(name, folder, options, interval):
        started.append(options)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "a.safetensors").write_bytes(b"12")
        metrics = {"seconds": 2.0, "cpu_seconds": float(len(started)), "peak_rss_bytes": 5}
        return {"metrics": metrics}, Usage(0, 3.0, 4.0, {"driver": Peak(1, 7, 6)})

    monkeypatch.setattr(runs, "hasten_job", job)
    first = hasten_compress(tmp_path, {"bits": 4})
    assert hasten_compress(tmp_path, {"bits": 4}) == first
    assert len(started) == 1
    assert hasten_compress(tmp_path, {"bits": 3}).cpu_seconds == 2.0
    monkeypatch.setattr(runs.resources, "git_commit", lambda: "another")
    assert hasten_compress(tmp_path, {"bits": 3}).cpu_seconds == 3.0


def test_a_peer_without_a_python_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        check_peer(str(tmp_path / "python"))


def test_a_peer_without_llm_compressor_is_a_mistake():
    with pytest.raises(UserError, match="pip install llmcompressor"):
        check_peer(sys.executable)
