import torch

from hasten.accel.cache.base import CacheBudget
from hasten.accel.cache.evict.streaming_llm import StreamingLLM
from hasten.accel.cache.full import Full
from hasten.accel.cache.measure import CacheMeasurement
from hasten.accel.models.checkpoint import resolve
from hasten.cluster.programs import caches
from hasten.cluster.programs.caches import CacheInputs, CacheRow


def test_rows_of_a_process_share_the_model_and_the_full_caches_predictions(monkeypatch):
    loaded, full = [], []
    load_model, log_probs = caches.load_model, CacheMeasurement.log_probs

    def counted_load(inputs):
        loaded.append(inputs.model)
        return load_model(inputs)

    def counted_log_probs(self, window, context):
        full.append(isinstance(self.method, Full))
        return log_probs(self, window, context)

    monkeypatch.setattr(caches, "load_model", counted_load)
    monkeypatch.setattr(CacheMeasurement, "log_probs", counted_log_probs)
    windows = torch.randint(10, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = CacheInputs(resolve("embedded:draft"), torch.float32, "cpu", windows, 24, {})
    rows = [CacheRow(StreamingLLM(), CacheBudget(share)) for share in (0.5, 0.75)]
    found = [caches._measure("first", inputs, row, 1) for row in rows]
    assert len(loaded) == 1
    assert sum(full) == len(windows)
    assert found[0]["kl_divergence"] > 0
    # Another session has other inputs: nothing of the last one is taken.
    again = caches._measure("second", inputs, rows[0], 1)
    assert len(loaded) == 2
    assert again["kl_divergence"] == found[0]["kl_divergence"]
    caches._LAST.clear()
