import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.cache.full import Full
from hasten.accel.cache.measure import FullPredictions, measure
from hasten.accel.errors import UserError
from hasten.accel.evaluation.recall import Sample, Turn
from hasten.accel.models.checkpoint import resolve
from hasten.cluster.programs.caches import CacheInputs
from hasten.jobs.bench import cache
from hasten.jobs.bench.measurements.caches import write_inputs
from hasten.jobs.bench.peers import kv_caches
from hasten.jobs.common.schema import Tracking


def row(owner, method, kl_divergence, bytes_end, recall):
    return cache.Row(owner, method, kl_divergence, bytes_end, {"keys": recall})


ROWS = [
    row("hasten", "full", 0.0, 1000, 1.0),
    row("hasten", "half", 0.02, 505, 0.7),
    row("hasten", "other half", 0.03, 490, 0.9),
    row("kvpress", "full", 0.0, 1000, 1.0),
    row("kvpress", "press", 0.04, 500, 0.8),
    row("kvpress", "small", 0.5, 100, 0.1),
]


def test_a_peers_row_is_held_against_the_least_divergence_with_no_more_bytes():
    # 505 bytes count as 500; the full cache does not.
    assert cache.rival(ROWS[4], ROWS) is ROWS[1]
    assert cache.rival(ROWS[5], ROWS) is None
    assert cache.metrics(ROWS) == {"peer_rows": 2, "less_divergence": 1, "no_less_recall": 0}
    assert cache._cells(ROWS[4], ROWS)[-3:] == ["half", "0.50", "-10"]
    assert cache._cells(ROWS[1], ROWS)[-3:] == ["–", "–", "–"]


def test_a_row_that_failed_has_no_figures_and_counts_for_nobody():
    failed = cache.row_of("transformers", "hqq:2:0", {"error": "RuntimeError: sizes"})
    assert cache.metrics([*ROWS, failed]) == cache.metrics(ROWS)
    assert cache._cells(failed, ROWS)[2] == "failed"


def test_without_text_there_are_no_bytes():
    with pytest.raises(UserError, match="must hold text"):
        cache.run(cache.Config(tasks=["keys"]))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        resolve("embedded:draft"), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_a_peer_measures_what_hasten_measures(tmp_path, model):
    windows = torch.randint(10, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
    prompt = windows[:1]
    greedy = model.generate(prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4)[0, prompt.shape[1] :].tolist()
    # The model's own continuation, with one wrong token.
    answer = (*greedy[:3], (greedy[3] + 1) % 4096)
    tokens = tuple(prompt[0].tolist())
    sample = Sample(tokens[:20], (Turn(tokens[20:], answer),))
    inputs = CacheInputs(resolve("embedded:draft"), torch.float32, "cpu", windows, 24, {"keys": [sample]})
    given = json.loads(write_inputs(inputs, tmp_path / "inputs.json").read_text())
    with torch.no_grad():
        found = kv_caches.measure(model, given, "full", {})
    assert found["kl_divergence"] == 0
    # Keys and values of 29 tokens in two layers of one head of 64 columns.
    assert found["bytes_end"] == 2 * 2 * 29 * 64 * 4
    own = measure(model, Full(), None, FullPredictions(model, windows, 24), inputs.recall)
    assert own["recall_keys"] == found["recall_keys"] == 0.75


def test_bytes_of_quantized_caches_are_found_in_what_their_layers_refer_to():
    class Layer:
        def __init__(self):
            self.keys = torch.zeros(3)
            codes = torch.zeros(8, dtype=torch.uint8)
            self._quantized_keys = (codes[:4], {"scale": torch.zeros(2), "of": [codes]})

    class Cache:
        layers = (Layer(),)

    assert kv_caches.held_bytes(Cache()) == 3 * 4 + 8 + 2 * 4


def test_a_peer_goes_on_behind_the_rows_that_it_has(tmp_path):
    inputs, result = tmp_path / "inputs.json", str(tmp_path / "result.json")
    inputs.write_text("{}")
    given = {"model": "some", "inputs": kv_caches.digest(str(inputs)), "versions": {"kvpress": "0.5.5"}}
    assert kv_caches.known_rows(result, given) == {}
    rows = {"full": {"kl_divergence": 0.0}, "hqq:2:0": {"error": "RuntimeError: sizes"}}
    kv_caches.write_result(result, {**given, "rows": rows})
    # What failed is tried again; rows of other tokens or packages are not taken.
    assert kv_caches.known_rows(result, given) == {"full": {"kl_divergence": 0.0}}
    assert kv_caches.known_rows(result, {**given, "versions": {"kvpress": "0.5.6"}}) == {}
    inputs.write_text("{ }")
    assert kv_caches.known_rows(result, {**given, "inputs": kv_caches.digest(str(inputs))}) == {}


def test_a_benchmark_takes_the_rows_that_are_in_its_folder(tmp_path, monkeypatch):
    options = {
        "model": "embedded:draft",
        "method": ["streaming_llm"],
        "budget": [0.5],
        "tasks": ["text"],
        "context": 24,
        "new_tokens": 4,
        "sequences": 1,
        "run_dir": str(tmp_path / "run"),
        "document": str(tmp_path / "table.md"),
        "tracking": Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    }
    first = json.loads(cache.run(cache.Config(**options)).read_text())
    monkeypatch.setattr("hasten.accel.cache.measure.measure", None)
    again = json.loads(cache.run(cache.Config(**options)).read_text())
    assert again["rows"] == first["rows"]
    assert [row["method"] for row in first["rows"]] == ["full", "streaming_llm 0.5"]
    assert first["rows"][1]["kl_divergence"] > 0
