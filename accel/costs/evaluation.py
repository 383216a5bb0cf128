"""Cost of evaluating a checkpoint on held-out windows, block by block, in comparison with its original."""

from dataclasses import dataclass
from math import ceil, prod

from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model, with_retained
from hasten.accel.costs.ranks import DEEPSPEED_BYTES, Ranks

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
    ranks: Ranks | None = None,
) -> Estimate:
    """Estimate of `hasten.cluster.programs.evaluation.measure`. packed: whether the model's layers must be unpacked.

    ranks: division of every worker over the ranks of a group; None is one process.
    """
    parts = min(workers, windows.number)
    if not parts:
        return Estimate((), ())
    size = 1 if ranks is None else ranks.size
    # Ranks that divide the work of a layer have the states of all their group's windows.
    worker_windows = ceil(windows.number / parts / (size if ranks is not None and ranks.collects else 1))
    models = [model] if original is None else [model, original]
    block = model.largest_block()
    layer = max(model.architecture.linears(block), key=lambda linear: linear.rows * linear.columns)
    states = {"hidden states": sum(one.hidden_bytes(worker_windows, windows.length) for one in models)}
    # While the batches are concatenated, both the batches and the result are in memory.
    joined = {"hidden states": sum(states.values()) + model.hidden_bytes(worker_windows, windows.length)}
    held, expert = (max(sizes) for sizes in zip(*(one.streamed() for one in models), strict=True))
    kept, held_by_rank = {"weights of a block": held}, dict[str, int]()
    if expert:
        kept["layer of an expert"] = expert
        kept["windows that wait for experts"] = model.waiting_at_experts(worker_windows, windows.length, batch)
    if ranks is not None:
        kept, held_by_rank = ranks.block_weights(model)
        held_by_rank |= {"DeepSpeed": DEEPSPEED_BYTES}
        if ranks.collects:
            # All windows of a model wait in the middle of a block, whose input is among its hidden states.
            waiting = model.waiting_bytes(worker_windows, windows.length)
            states["hidden states"] += waiting - model.hidden_bytes(worker_windows, windows.length)
    run = {
        **states,
        **kept,
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
        host = {"run": {"process": rates.worker_bytes, **held_by_rank, "tensor as it is read": _largest_tensor(models)}}
        device = {
            name: {"context": rates.device_bytes, **held}
            for name, held in (("embed", joined), ("run", run), ("compare", compare))
        }
    else:
        phases = (("embed", joined, 0), ("run", run, run["activations"]), ("compare", compare, compare["logits"]))
        base = {"process": rates.worker_bytes, **held_by_rank}
        host = {name: with_retained({**base, **held}, freed) for name, held, freed in phases}
        device = {}
    tokens, work, sent = windows.number * windows.length, Work(), 0
    load = Work()
    for one in models:
        for index in range(one.blocks):
            work += one.run(index, tokens, windows.length, batch)
            load += one.load(index) * (1 / size if ranks is not None and ranks.collects else 1)
            sent += 0 if ranks is None else parts * ranks.block_moved(one, index, tokens / parts)
        work += one.logits(tokens)
        load += Work(file_bytes=one.head_bytes())
    if packed:
        load += Work(elements=20 * model.elements(), launches=model.blocks * 7 * 60)
    compared = _LOGIT_COMPARED if original is not None else _LOGIT_ALONE
    work += Work(elements=compared * tokens * model.vocabulary)
    seconds, loading = work.seconds(rates), load.seconds(rates)
    step = Step(
        kind,
        rates.worker_start + seconds * ceil(windows.number / parts) / size / windows.number + loading,
        parts * size * (rates.worker_start + loading) + seconds,
    )
    moved = {"windows": parts * size * worker_windows * windows.length * 8}
    steps = [step]
    if sent:
        moved["between ranks"] = sent
        # All ranks send at the same time.
        steps.append(Step("exchange between ranks", sent / parts / size / rates.store, sent / rates.store))
    name = kind if ranks is None else f"rank of a group for {kind}"
    return Estimate((Process(name, parts * size, threads, host, gpus, device),), tuple(steps), moved)


def _largest_tensor(models: list[Model]) -> int:
    """Bytes of the largest tensor that is read at once: of embeddings and heads only some rows are, unless packed."""
    largest = 0
    for model in models:
        architecture = model.architecture
        names = {name for index in range(model.blocks) for name in architecture.block_tensors(index)}
        sizes = (architecture.checkpoint.nbytes(name) for name in names)
        largest = max(largest, model.streamed_head_bytes(), *sizes)
    return largest
