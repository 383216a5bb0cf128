"""KV caches of kvpress and of transformers: run by the Python of an environment that has either.

Stand-alone on purpose: kvpress 0.5 needs transformers below 5.3, and neither environment has hasten. The inputs are
token ids that hasten wrote, and the figures are those of `hasten cache`: KL divergence from the full cache and recall,
token by token, and bytes of the tensors that the cache holds when the text's last token is predicted.

Methods: `full`, `press:NAME:RATIO` (a press of kvpress, RATIO of the tokens removed) and `BACKEND:BITS:AXIS`
(transformers' QuantizedCache; AXIS of the keys as a backend numbers it; values have the same, or 0 with -1: KIVI).
Departs from the peers' use in one thing: positions are given, because a cache with fewer tokens would count them anew.
"""

import argparse
import contextlib
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from operator import eq
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

_PACKAGES = ("kvpress", "transformers", "optimum-quanto", "hqq")


def main() -> None:
    """Measure methods one after the other."""
    parser = argparse.ArgumentParser()
    for name in ("result", "model", "inputs", "methods"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    with open(arguments.inputs, encoding="utf-8") as file:
        inputs = json.load(file)
    # Tokens, model and packages that the rows are of.
    given = {"model": arguments.model, "inputs": digest(arguments.inputs), "versions": versions()}
    known, rows = known_rows(arguments.result, given), dict[str, dict[str, Any]]()
    full: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for method in arguments.methods.split(","):
            if method in known:
                rows[method] = known[method]
                continue
            try:
                rows[method] = measure(model.eval(), inputs, method, full)
            except (RuntimeError, ValueError, ImportError) as error:
                rows[method] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            # After every method, so that a run that is ended goes on behind its last row.
            write_result(arguments.result, {**given, "rows": {**known, **rows}})
    write_result(arguments.result, {**given, "rows": rows})


def known_rows(path: str, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows with figures in an earlier result of the same things; empty where there is none."""
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        earlier = json.load(file)
    if {name: earlier.get(name) for name in given} != given:
        return {}
    return {method: row for method, row in earlier["rows"].items() if "error" not in row}


def write_result(path: str, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(f"{path}.part", path)


def digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def measure(model: Any, inputs: Any, method: str, full: dict[int, torch.Tensor]) -> dict[str, float]:
    """Figures of a method. full: predictions with the full cache by window, to which missing ones are added."""
    context = inputs["context"]
    divergence, tokens, held = 0.0, 0, 0
    for number, window in enumerate(inputs["windows"]):
        if number not in full:
            full[number], _ = log_probs(model, window, context, "full")
        own, held = log_probs(model, window, context, method)
        divergence += float((full[number].exp() * (full[number] - own)).sum())
        tokens += len(own)
    row = {"kl_divergence": divergence / tokens, "bytes_end": held}
    for task, samples in inputs["recall"].items():
        right = [part for sample in samples for part in answers(model, sample, method)]
        row[f"recall_{task}"] = sum(right) / len(right)
    return row


def log_probs(model: Any, window: list[int], context: int, method: str) -> tuple[torch.Tensor, int]:
    """Log probabilities (T - context, V) of the tokens behind the context; the bytes held at the end."""
    cache = new_cache(model, method)
    parts = [prefill(model, cache, window[:context], method)]
    parts += [step(model, cache, window[place], place) for place in range(context, len(window) - 1)]
    return torch.stack(parts).float().log_softmax(-1), held_bytes(cache)


def answers(model: Any, sample: Any, method: str) -> list[bool]:
    """Whether each token of the answers is the most probable one, behind the right ones."""
    cache = new_cache(model, method)
    prefill(model, cache, sample["context"], method)
    place, right = len(sample["context"]), list[bool]()
    for question, answer in sample["turns"]:
        tokens = (*question, *answer)
        predicted = [int(step(model, cache, token, place + at).argmax()) for at, token in enumerate(tokens)]
        place += len(tokens)
        right.extend(map(eq, predicted[len(question) - 1 : -1], answer))
    return right


def new_cache(model: Any, method: str) -> Any:
    """An empty cache."""
    kind, *parts = method.split(":")
    if kind in ("full", "press"):
        return DynamicCache()
    from transformers import QuantizedCache

    bits, axis = (int(part) for part in parts)
    size = model.config.head_dim
    return QuantizedCache(kind, model.config, nbits=bits, axis_key=axis, axis_value=max(axis, 0), q_group_size=size)


def prefill(model: Any, cache: Any, tokens: list[int], method: str) -> torch.Tensor:
    """Logits (V,) behind a prompt; a press compresses what the cache holds of it."""
    ids = torch.tensor([tokens])
    if not method.startswith("press:"):
        logits: torch.Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return logits
    import kvpress

    _, name, ratio = method.split(":")
    with getattr(kvpress, name)(compression_ratio=float(ratio))(model):
        found: torch.Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return found


def step(model: Any, cache: Any, token: int, place: int) -> torch.Tensor:
    """Logits (V,) behind a token at a position."""
    ids, positions = torch.tensor([[token]]), torch.tensor([[place]])
    logits: torch.Tensor = model(ids, past_key_values=cache, position_ids=positions).logits[0, -1]
    return logits


def held_bytes(cache: Any) -> int:
    """Bytes of the storages of all tensors that are reached from the cache's layers, each once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack = [vars(layer) for layer in cache.layers]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if hasattr(one, "__tensor_flatten__"):
                stack += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
            else:
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, list | tuple):
            stack += one
    return sum(storages.values())


if __name__ == "__main__":
    main()
