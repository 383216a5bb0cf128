"""Cost of evaluating a checkpoint on held-out windows, block by block, in comparison with its original."""

from dataclasses import dataclass
from math import ceil, prod

from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model, with_retained

# Elementwise operations on a logit, in the cache: normalizer of one model; of two models, and their divergence.
_LOGIT_ALONE, _LOGIT_COMPARED = 2, 4
# Bytes of a packed weight while it is unpacked: words, codes, values.
_UNPACKED_BYTES = 13


@dataclass(frozen=True)
class Windows:
    """Held-out windows: their number, and their length in tokens."""

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
    """Estimate of `hasten.cluster.programs.evaluation.measure`. packed: whether the model's layers must be unpacked."""
    parts = min(workers, windows.number)
    if not parts:
        return Estimate((), ())
    worker_windows = ceil(windows.number / parts)
    models = [model] if original is None else [model, original]
    block = model.largest_block()
    layer = max(model.architecture.linears(block), key=lambda linear: linear.rows * linear.columns)
    states = {"hidden states": sum(one.hidden_bytes(worker_windows, windows.length) for one in models)}
    # While the batches are concatenated, both the batches and the result are in memory.
    joined = {"hidden states": sum(states.values()) + model.hidden_bytes(worker_windows, windows.length)}
    run = {
        **states,
        "weights of a block": max(one.block_bytes(block) for one in models),
        "activations": model.activation_bytes(batch, windows.length),
    }
    if packed:
        run["weight being unpacked"] = _UNPACKED_BYTES * prod((layer.rows, layer.columns))
    compare = {
        **states,
        "heads": sum(one.streamed_head_bytes() for one in models),
        "logits": model.tile_bytes(len(models), gpu=gpus > 0),
    }
    if gpus:
        host = {"run": {"process": rates.worker_bytes, "tensor as it is read": _largest_tensor(models)}}
        device = {
            name: {"context": rates.device_bytes, **held}
            for name, held in (("embed", joined), ("run", run), ("compare", compare))
        }
    else:
        phases = (("embed", joined, 0), ("run", run, run["activations"]), ("compare", compare, compare["logits"]))
        host = {name: with_retained({"process": rates.worker_bytes, **held}, freed) for name, held, freed in phases}
        device = {}
    tokens, work = windows.number * windows.length, Work()
    load = Work()
    for one in models:
        for index in range(one.blocks):
            work += one.run(index, tokens, windows.length, batch)
            load += one.load(index)
        work += one.logits(tokens)
        load += Work(file_bytes=one.head_bytes())
    if packed:
        load += Work(elements=20 * model.elements(), launches=model.blocks * 7 * 60)
    compared = _LOGIT_COMPARED if original is not None else _LOGIT_ALONE
    work += Work(elements=compared * tokens * model.vocabulary)
    seconds, loading = work.seconds(rates), load.seconds(rates)
    step = Step(
        kind,
        rates.start + seconds * worker_windows / windows.number + loading,
        parts * (rates.start + loading) + seconds,
    )
    moved = {"windows": parts * worker_windows * windows.length * 8}
    return Estimate((Process(kind, parts, threads, host, gpus, device),), (step,), moved)


def _largest_tensor(models: list[Model]) -> int:
    """Bytes of the largest tensor that is read at once: of embeddings and heads only some rows are, unless packed."""
    largest = 0
    for model in models:
        architecture = model.architecture
        names = {name for index in range(model.blocks) for name in architecture.block_tensors(index)}
        sizes = (architecture.checkpoint.nbytes(name) for name in names)
        largest = max(largest, model.streamed_head_bytes(), *sizes)
    return largest
