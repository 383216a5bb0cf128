"""Measuring a checkpoint on held-out windows, block by block, beside its original."""

from dataclasses import dataclass
from math import ceil, prod

from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model, with_kept_back

# Numbers of a logit that go through small operations: softmax of two models, and what their divergence takes.
_LOGIT_ALONE, _LOGIT_COMPARED = 6, 14
# Bytes of a packed weight while it is turned back: words, codes, values.
_UNPACKED_BYTES = 13
_LOGITS_BYTES = 4 << 20


@dataclass(frozen=True)
class Windows:
    """Held-out text: how many windows, and how long they are."""

    number: int
    length: int


def estimate(
    model: Model,
    windows: Windows,
    rates: Rates,
    original: Model | None = None,
    packed: bool = False,
    batch: int = 8,
    workers: int = 2,
    threads: int = 1,
    gpus: int = 0,
    kind: str = "evaluation",
) -> Estimate:
    """What `hasten.cluster.programs.evaluation.measure` takes; packed: whether the model's layers must be unpacked."""
    parts = min(workers, windows.number)
    if not parts:
        return Estimate((), ())
    most = ceil(windows.number / parts)
    models = [model] if original is None else [model, original]
    block = model.largest_block()
    layer = max(model.architecture.linears(block), key=lambda each: each.rows * each.columns)
    states = {"hidden states": sum(each.hidden_bytes(most, windows.length) for each in models)}
    # Both halves of what is put together are there for a moment.
    joined = {"hidden states": sum(states.values()) + model.hidden_bytes(most, windows.length)}
    run = {
        **states,
        "weights of a block": max(each.block_bytes(block) for each in models),
        "activations": model.activation_bytes(batch, windows.length),
    }
    if packed:
        run["weight being unpacked"] = _UNPACKED_BYTES * prod((layer.rows, layer.columns))
    compare = {
        **states,
        "heads": sum(each.head_bytes() for each in models),
        "logits": len(models) * 6 * _LOGITS_BYTES,
    }
    if gpus:
        host = {"run": {"process": rates.worker_bytes, "tensor as it is read": _largest_tensor(models)}}
        device = {
            name: {"context": rates.device_bytes, **held}
            for name, held in (("embed", joined), ("run", run), ("compare", compare))
        }
    else:
        phases = (("embed", joined, 0), ("run", run, run["activations"]), ("compare", compare, compare["logits"]))
        host = {name: with_kept_back({"process": rates.worker_bytes, **held}, freed) for name, held, freed in phases}
        device = {}
    tokens, work = windows.number * windows.length, Work()
    load = Work()
    for each in models:
        for index in range(each.blocks):
            work += each.run(index, tokens, windows.length, batch)
            load += each.load(index)
        work += each.logits(tokens)
        load += Work(file_bytes=each.head_bytes())
    if packed:
        load += Work(elements=20 * model.elements(), launches=model.blocks * 7 * 60)
    compared = _LOGIT_COMPARED if original is not None else _LOGIT_ALONE
    work += Work(elements=compared * tokens * model.vocabulary)
    seconds, loading = work.seconds(rates), load.seconds(rates)
    step = Step(
        kind,
        rates.start + seconds * most / windows.number + loading,
        parts * (rates.start + loading) + seconds,
    )
    moved = {"windows": parts * most * windows.length * 8}
    return Estimate((Process(kind, parts, threads, host, gpus, device),), (step,), moved)


def _largest_tensor(models: list[Model]) -> int:
    found = 0
    for model in models:
        checkpoint = model.architecture.checkpoint
        found = max(found, *(checkpoint.nbytes(name) for name in checkpoint.names))
    return found
