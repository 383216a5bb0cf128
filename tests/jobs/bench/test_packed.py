"""`hasten bench packed`."""

import pytest

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.bench import packed
from hasten.jobs.bench.processes.decode_speed import measure


def speed(token, tokens=(1, 2), memory=10**6):
    return {"token_seconds": token, "prompt_seconds": 2 * token, "memory_bytes": memory, "tokens": list(tokens)}


def test_the_least_of_alternating_processes_counts():
    order, rows = [], {"hasten, original": [0.5, 0.4], "hasten, 4 bits, embedding 8 bits": [0.1, 0.2]}

    def next_of(name):
        order.append(name)
        return speed(rows[name].pop(0))

    results = packed._alternating({name: lambda name=name: next_of(name) for name in rows}, rounds=2)
    assert order == list(rows) * 2
    assert [row["token_seconds"] for row in results.values()] == [0.4, 0.1]
    metrics = packed._metrics(results)
    assert metrics["hasten_4_bits_embedding_8_bits_speed"] == pytest.approx(4.0)
    text = packed._section(packed.Config(), results)
    assert "| hasten, 4 bits, embedding 8 bits | 100.00 | 4.00 | 200 | 1 |" in text


def test_other_tokens_of_the_same_checkpoint_are_an_error():
    found = iter([speed(0.1, [1]), speed(0.1, [2])])
    with pytest.raises(AssertionError, match="decoded other tokens in another process"):
        packed._alternating({"hasten, original": lambda: next(found)}, rounds=2)


def test_wrong_options_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"peer_types=Q4_0 is wrong: expected TYPE/TYPE, such as Q4_0/Q8_0"):
        packed.run(packed.Config(peer_types=["Q4_0"]))
    with pytest.raises(UserError, match="no such file; give the bin/python of an environment with llama-cpp-python"):
        packed.run(packed.Config(peer_python=str(tmp_path / "python")))


def test_a_process_measures_time_memory_and_tokens():
    found = measure(resolve("embedded:target"), [1, 5, 7], tokens=8, length=16, repeats=1)
    assert len(found["tokens"]) == 8
    assert 0 < found["token_seconds"] < 10
    assert 0 < found["prompt_seconds"] < 10
    assert found["memory_bytes"] >= 0
