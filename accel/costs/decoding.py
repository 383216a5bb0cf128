"""Cost of decoding: targets and draft models with their caches, and forward passes that read all weights once."""

from dataclasses import dataclass
from math import prod

import torch

from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model
from hasten.accel.costs.ranks import DEEPSPEED_BYTES, Ranks

# Logits, their float32 copy, and the copy that verification makes (hasten.accel.decoding.bounds).
_COPIES_OF_LOGITS = 3
# Limit of a process for second copies of weights in the CPU library's own layout, which exist for float32 only.
_MAX_PACKED_BYTES = 2**31
# Operations of a block in a pass of the fast path, and operations of the loop around a pass.
_LAUNCHES_OF_A_BLOCK, _LAUNCHES_OF_A_PASS = 26, 250
# Repetitions at every size when the target's passes are timed before decoding starts.
_TIMED_PASSES = 20
# Bytes of a result's line without ids and text, and bytes of the text of a token.
_RESULT_BYTES, _TEXT_BYTES = 690, 3.6


@dataclass(frozen=True)
class Decoding:
    """A decoding job as plain values.

    prompts: number of prompts. prompt_tokens: their mean length. longest: length of the longest sequence, completion
    included. draft: the drafter's model, None without one. drafted: maximum number of draft tokens. measures: whether
    passes are timed before decoding. fast: whether the fast path runs the models. tokens_per_pass: tokens that a pass
    adds to a sequence. ranks: division of the target over a group, of which every worker is one; None is one process.
    """

    target: Model
    prompts: int
    prompt_tokens: float
    longest: int
    new_tokens: int
    draft: Model | None = None
    drafted: int = 0
    measures: bool = True
    in_flight: int = 8
    prefill_chunk: int = 512
    memory_bytes: int | None = None
    fast: bool = True
    workers: int = 1
    threads: int = 1
    gpus: int = 0
    tokens_per_pass: float = 1.0
    ranks: Ranks | None = None


def estimate(decoding: Decoding, rates: Rates) -> Estimate:
    """Memory and seconds of verifiers and their drafters, and bytes of the file of completions."""
    one = decoding
    share = -(-one.prompts // (2 * one.workers if one.workers > 1 else 1))
    slots = max(1, min(one.in_flight, max(one.in_flight, share), one.prompts))
    held = _caches(one.target, one, slots)
    if one.draft is not None:
        nodes = one.drafted + 1
        held["draft model's caches"] = slots * one.draft.token_bytes * (one.longest + nodes)
        held["draft model's logits"] = slots * nodes * one.draft.vocabulary * 4 * _COPIES_OF_LOGITS
    if one.memory_bytes is not None:
        held = _bounded(held, one.memory_bytes)
    offloaded: dict[str, int] = {}
    if one.ranks is None:
        kept, as_loaded = weights(one.target, one.fast, bool(one.gpus)), loaded_bytes(one.target, one.fast)
    else:
        kept, offloaded = one.ranks.weights(one.target)
        offloaded = offloaded | {"DeepSpeed": DEEPSPEED_BYTES}
        as_loaded = one.ranks.loading(one.target)
    loading = {"weights": sum(kept.values()), "model as it is loaded": as_loaded}
    drafts = {}
    if one.draft is not None:
        drafts = {"draft model": sum(weights(one.draft, one.fast, bool(one.gpus)).values())}
    decode = {**kept, **held, **drafts}
    if one.gpus:
        read = loaded_bytes(one.target, True) if one.ranks is None else as_loaded
        host = {"load": {"process": rates.worker_bytes, "model as it is loaded": read, **offloaded}}
        device = {
            name: {"context": rates.device_bytes, **parts} for name, parts in (("load", loading), ("decode", decode))
        }
    else:
        host = {
            name: {"process": rates.worker_bytes, **parts, **offloaded}
            for name, parts in (("load", loading), ("decode", decode))
        }
        device = {}
    size = 1 if one.ranks is None else one.ranks.size
    kind = "verifier" if one.ranks is None else "rank of a target group"
    process = Process(kind, one.workers * size, one.threads, host, one.gpus, device)
    driver = Process("driver", 1, 0, {"decode": {"process": rates.driver_bytes}})
    written = int(one.prompts * _line_bytes(one))
    moved = _moved(one)
    notes: tuple[str, ...] = ()
    if one.ranks is not None:
        rows = min(slots, -(-one.prompts // one.workers)) * _width(one)
        per_pass = one.ranks.moved(one.target, rows)
        moved["between ranks"] = int(one.workers * per_pass * _passes(one, slots)) + _prefilled(one)
        notes = (
            f"the {size} ranks of a group are on one node; a pass over {rows} tokens sends {per_pass:,} bytes between "
            "them",
        )
    return Estimate((process, driver), tuple(_steps(one, slots, rates)), moved, 0, {"completions": written}, notes)


def pass_work(model: Model, sequences: int, tokens: int, length: int, itemsize: float | None = None) -> Work:
    """Work of one forward pass over `tokens` tokens of each sequence, with `length` tokens in the caches.

    A pass reads all weights. itemsize: bytes of a weight; None is the model's dtype.
    """
    rows = sequences * tokens
    weights = model.elements() * (itemsize or model.dtype.itemsize)
    flops = rows * (2.0 * model.elements() + 4 * length * model.attention * model.blocks)
    cache = sequences * length * model.token_bytes
    launches = model.blocks * _LAUNCHES_OF_A_BLOCK + _LAUNCHES_OF_A_PASS
    elements = rows * (model.blocks * (24 * model.hidden + 4 * model.inner) + 4 * model.vocabulary)
    # With few rows a pass is bound by reading the weights, with many rows by the products.
    return Work(flops=flops, memory_bytes=weights + cache, elements=elements, launches=launches)


def weights(model: Model, fast: bool, on_device: bool) -> dict[str, int]:
    """Bytes of the model in memory. The fast path on a CPU holds an embedding that is also the head twice.

    Running in float32, the fast path keeps bfloat16 weights as stored; it holds other weights a second time, in the
    layout of the CPU library. Quantized weights stay packed, one that is embedding and head only once.
    """
    itemsize = itemsize_of(model, fast, on_device)
    size = int(model.elements() * itemsize)
    if not fast or on_device:
        return {"weights": size}
    checkpoint = model.architecture.checkpoint
    for name in model.architecture.outer_tensors():
        if "embed_tokens" in name and name == model.architecture.head_name() and not checkpoint.is_packed(name):
            size += prod(checkpoint.shape(name)) * _plain_itemsize(model, on_device)
    parts = {"weights": size}
    if itemsize == 4:
        parts["weights in the library's order"] = min(_MAX_PACKED_BYTES, size)
    return parts


def itemsize_of(model: Model, fast: bool, on_device: bool) -> float:
    """Bytes of a weight that a pass reads, on average.

    The fast path reads quantized weights packed, and on a CPU it keeps bfloat16 weights as stored.
    """
    checkpoint = model.architecture.checkpoint
    if not fast:
        return model.dtype.itemsize
    plain = _plain_itemsize(model, on_device)
    if not checkpoint.is_compressed:
        return plain
    packed = [name for name in checkpoint.names if checkpoint.is_packed(name)]
    unpacked = sum(prod(checkpoint.shape(name)) for name in packed)
    stored = sum(checkpoint.stored_bytes(name) for name in packed)
    return (stored + (model.elements() - unpacked) * plain) / model.elements()


def _plain_itemsize(model: Model, on_device: bool) -> int:
    """Bytes of a weight that is not quantized, on the fast path."""
    stored = model.architecture.checkpoint.dtype(model.architecture.head_name())
    return 2 if stored == torch.bfloat16 and not on_device else model.dtype.itemsize


def loaded_bytes(model: Model, fast: bool) -> int:
    """Additional memory while the model is loaded: a whole copy where the fast path converts it."""
    checkpoint = model.architecture.checkpoint
    if fast and checkpoint.is_compressed:  # read tensor by tensor
        return max(checkpoint.stored_bytes(name) for name in checkpoint.names)
    return model.elements() * model.dtype.itemsize if fast else model.stored_bytes() // 4


def _caches(model: Model, decoding: Decoding, slots: int) -> dict[str, int]:
    nodes = decoding.drafted + 1
    prefill = min(decoding.prefill_chunk, int(decoding.longest))
    share = 1.0 if decoding.ranks is None else decoding.ranks.cache_share()
    return {
        "caches": int(slots * (decoding.longest + nodes) * model.token_bytes * share),
        "logits": slots * nodes * model.vocabulary * 4 * _COPIES_OF_LOGITS,
        "activations": model.activation_bytes(1, max(prefill, slots * nodes)),
    }


def _bounded(held: dict[str, int], bound: int) -> dict[str, int]:
    """Memory with caches and logits scaled down so that together they take at most `bound` bytes."""
    bounded = {name: size for name, size in held.items() if name != "activations"}
    total = sum(bounded.values())
    share = min(1.0, bound / total) if total else 1.0
    return held | {name: int(size * share) for name, size in bounded.items()}


def _line_bytes(decoding: Decoding) -> float:
    """Bytes of a result's line: ids of prompt and completion, the completion's text, and statistics."""
    number = len(str(decoding.target.vocabulary - 1)) + 1
    ids = number * (decoding.prompt_tokens + decoding.new_tokens)
    return _RESULT_BYTES + ids + _TEXT_BYTES * decoding.new_tokens


def _moved(decoding: Decoding) -> dict[str, int]:
    return {
        "prompts": int(decoding.prompts * decoding.prompt_tokens * 8),
        "completions": int(decoding.prompts * decoding.new_tokens * 8),
    }


def _width(one: Decoding) -> int:
    """Tokens of a sequence in a pass."""
    return 1 if one.tokens_per_pass == 1 else 1 + min(8, one.drafted)


def _passes(one: Decoding, slots: int) -> float:
    """Passes of a worker, without those over prompts."""
    per_worker = -(-one.prompts // one.workers)
    return one.new_tokens / one.tokens_per_pass * -(-per_worker // slots)


def _prefilled(one: Decoding) -> int:
    """Bytes between ranks in the passes over all prompts, in chunks."""
    assert one.ranks is not None
    chunks = -(-int(one.prompt_tokens) // one.prefill_chunk)
    return int(one.prompts * chunks * one.ranks.moved(one.target, one.prompt_tokens / max(1, chunks)))


def _steps(one: Decoding, slots: int, rates: Rates) -> list[Step]:
    length = one.longest // 2
    per_worker = -(-one.prompts // one.workers)
    passes, width = _passes(one, slots), _width(one)
    itemsize = itemsize_of(one.target, one.fast, bool(one.gpus))
    decode = pass_work(one.target, min(slots, per_worker), width, length, itemsize) * passes
    if one.draft is not None and one.tokens_per_pass > 1:
        own = itemsize_of(one.draft, one.fast, bool(one.gpus))
        decode += pass_work(one.draft, min(slots, per_worker), 1, length, own) * (passes * min(8, one.drafted))
    prefill = pass_work(one.target, 1, max(1, int(one.prompt_tokens)), length, itemsize) * per_worker
    load = Work(elements=3 * one.target.elements(), file_bytes=4 * one.target.elements() * one.target.dtype.itemsize)
    begin = load.seconds(rates)
    timing = 0.0
    if one.measures and one.drafted:
        sizes = [1 << power for power in range(one.drafted.bit_length())]
        for size in [*sizes, one.drafted + 1]:
            for sequences in {1, one.in_flight}:
                work = pass_work(one.target, sequences, size, length, itemsize)
                timing += work.seconds(rates) * _TIMED_PASSES
    seconds = {
        "load": begin,
        "time the passes": timing,
        "prefill": prefill.seconds(rates),
        "decode": decode.seconds(rates),
    }
    if one.ranks is not None:
        for name in ("time the passes", "prefill", "decode"):
            # With ZeRO-3, every rank does the whole work.
            seconds[name] /= 1 if one.ranks.collects else one.ranks.size
        rows = min(slots, per_worker) * width
        sent = one.ranks.moved(one.target, rows) * passes + _prefilled(one) / one.workers
        # The ranks send at the same time.
        seconds["exchange between ranks"] = sent / one.ranks.size / rates.store
    ranks = 1 if one.ranks is None else one.ranks.size
    check = Work(elements=one.target.elements(), file_bytes=one.target.stored_bytes()).seconds(rates)
    return [Step("check weights", check / one.workers, check)] + [
        Step(name, value, value * one.workers * ranks) for name, value in seconds.items() if value
    ]
