"""The embedded recall variant answers from its context, and a cache that lost the answer does not."""

from functools import cache

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget
from hasten.accel.cache.evict.streaming_llm import StreamingLLM
from hasten.accel.cache.full import Full
from hasten.accel.cache.measure import CacheMeasurement
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.evaluation.recall import samples
from hasten.accel.models import embedded

TEXT = "".join(f"    total = add(total, step_{number})\n" for number in range(400))


@cache
def loaded():
    folder = embedded.path("recall")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    attach(model)
    return model, lambda text: tokenizer(text, add_special_tokens=False).input_ids


def recall(method, budget, task, context, count=4):
    model, encode = loaded()
    made = samples(task, encode, TEXT, context, count, seed=1)
    return CacheMeasurement(model, method, budget).recall(made)[0]


@pytest.mark.parametrize(("context", "least"), [(256, 0.9), (1500, 0.6)])
def test_it_finds_values_of_keys_also_behind_longer_contexts(context, least):
    assert recall(Full(), None, "keys", context) >= least


def test_what_was_dropped_is_not_recalled_and_what_was_quantized_is():
    whole = recall(Full(), None, "needle", 256)
    assert whole >= 0.9
    assert recall(KIVI(bits=8), None, "needle", 256) >= whole - 0.1
    assert recall(StreamingLLM(), CacheBudget(32), "needle", 256) <= whole - 0.4
