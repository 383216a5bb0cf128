"""Cost of measuring compressed caches: processes that each hold the model and one sequence's caches at a time."""

from dataclasses import dataclass

from hasten.accel.cache.base import CacheMethod
from hasten.accel.cache.sequence import QUERIES_AT_ONCE
from hasten.accel.costs.estimate import Estimate, Process, Rates, Step, Work
from hasten.accel.costs.model import Model, with_retained

# Operations of a block, and around the blocks, in a pass of transformers with compressed caches, most of whose time is
# Python's; and of a block when a prompt's cache is copied and compressed.
_LAUNCHES_OF_A_BLOCK, _LAUNCHES_OF_A_PASS, _LAUNCHES_OF_A_COMPRESSION = 1900, 1500, 4000
# Copies of scores, and of log probabilities of the predicted tokens, that live at once.
_SCORES, _PROBABILITIES = 3, 4
# Tensors of a cache grow by this factor, and the old ones are copied.
_GROWN = 2.5
# Bytes of code that transformers' models touch in a forked process, beside what every worker does; measured.
_MODEL_CODE = 50 * 10**6
# Bytes of a row's file without the bytes held at each step, and of each of these.
_ROW_BYTES, _STEP_BYTES = 420, 9
# Bytes of the file of a level, and of a mixture.
_LEVEL_BYTES, _MIXTURE_BYTES = 42, 128


@dataclass(frozen=True)
class Texts:
    """Texts of `tokens` tokens that are predicted behind `context` tokens, by the number of texts."""

    sequences: int
    context: int
    tokens: int


@dataclass(frozen=True)
class CacheWork:
    """A measurement of `rows` methods and budgets as plain values.

    text: None where no text is measured. recalled: prompts of `context` tokens, each with questions and answers of
    `asked` tokens.
    """

    model: Model
    rows: int
    text: Texts | None
    recalled: int = 0
    context: int = 0
    asked: int = 0
    workers: int = 2
    threads: int = 1
    gpus: int = 0


@dataclass(frozen=True)
class MixWork:
    """A search over mixtures. levels: of a layer. methods: of the levels. scored: tokens of the searcher's candidates.

    unseen: mixtures, and texts, of the final comparison.
    """

    model: Model
    levels: int
    methods: tuple[CacheMethod, ...]
    text: Texts
    scored: int
    mixtures: int
    unseen: Texts
    workers: int = 2
    threads: int = 1
    gpus: int = 0


def estimate(work: CacheWork, rates: Rates) -> Estimate:
    """Estimate of rows of `hasten cache`: each is a task, which loads the model."""
    model, text = work.model, work.text
    length = max(text.context + text.tokens if text else 0, work.context + work.asked)
    context = max(text.context if text else 0, work.context)
    held = {
        "caches": int(_GROWN * length * model.token_bytes),
        "log probabilities": _PROBABILITIES * 4 * model.vocabulary * (text.tokens if text else 1),
        **_prompt_bytes(model, context),
    }
    parts: dict[str, Work] = {}
    if text is not None:
        # The full cache and the method's, of every text.
        prompt = _pass(model, text.context, text.context)
        one = prompt + _pass(model, 1, text.context) * (text.tokens - 1)
        parts["text"] = one * (2 * text.sequences * work.rows)
    if work.recalled:
        one = _pass(model, work.context, work.context) + _pass(model, 1, work.context) * work.asked
        parts["recall"] = one * (work.recalled * work.rows)
    parts["load models"] = _load(model) * work.rows
    written = {"rows": work.rows * (_ROW_BYTES + (_STEP_BYTES * text.tokens if text else 0))}
    full = f"{length * model.token_bytes:,} bytes hold the full cache of a sequence of {length} tokens"
    return _processes(model, held, parts, min(work.workers, work.rows), work.threads, work.gpus, rates, written, full)


def mixtures(work: MixWork, rates: Rates) -> Estimate:
    """Estimate of `hasten search_cache`: tasks whose processes keep the model and the prompts' caches."""
    model, text, unseen = work.model, work.text, work.unseen
    # What methods remember of a prompt's queries, one prompt for each.
    kinds = len({(method.query_window, method.sums_attention) for method in work.methods} | {(0, False)})
    length = text.context + text.tokens
    sequences = max(text.sequences, unseen.sequences)
    held = {
        "prompts": kinds * sequences * text.context * model.token_bytes,
        "predictions of the full cache": sequences * text.tokens * model.vocabulary * 4,
        "caches": int(_GROWN * length * model.token_bytes),
        "log probabilities": _PROBABILITIES * 4 * model.vocabulary * text.tokens,
        **_prompt_bytes(model, text.context),
    }
    workers = min(work.workers, model.blocks)
    prompt = _pass(model, text.context, text.context) * kinds
    interval = min((method.interval for method in work.methods), default=text.tokens)
    pieces = -(-text.tokens // interval)
    one = _pass(model, min(interval, text.tokens), text.context) * pieces
    one += Work(launches=model.blocks * _LAUNCHES_OF_A_COMPRESSION, memory_bytes=4 * text.context * model.token_bytes)
    parts = {
        "prompts": prompt * (workers * (text.sequences + unseen.sequences)),
        "levels": one * (model.blocks * work.levels * text.sequences),
        # A searcher's samples are of whole sequences.
        "search": one * (work.scored / text.tokens),
        "unseen text": one * (work.mixtures * unseen.sequences),
        "load models": _load(model) * (2 * workers),
    }
    written = {
        "levels": model.blocks * work.levels * _LEVEL_BYTES,
        "mixtures": work.mixtures * _MIXTURE_BYTES,
    }
    full = f"{length * model.token_bytes:,} bytes hold the full cache of a sequence of {length} tokens"
    return _processes(model, held, parts, workers, work.threads, work.gpus, rates, written, full)


def _pass(model: Model, tokens: int, length: int) -> Work:
    """Work of a pass over `tokens` tokens, with `length` tokens in the cache."""
    one = Work(launches=_LAUNCHES_OF_A_PASS + model.blocks * _LAUNCHES_OF_A_BLOCK)
    # With few tokens a pass is bound by reading the weights.
    one += Work(memory_bytes=model.elements() * model.dtype.itemsize + length * model.token_bytes)
    for index in range(model.blocks):
        one += model.run(index, tokens, max(tokens, length), 1)
    return one + Work(flops=2.0 * model.hidden * model.vocabulary)


def _load(model: Model) -> Work:
    """Work of reading the model through transformers."""
    return Work(elements=model.elements(), file_bytes=model.stored_bytes())


def _prompt_bytes(model: Model, context: int) -> dict[str, int]:
    """Bytes of a pass over a prompt."""
    config = model.architecture.config
    queries = min(context, QUERIES_AT_ONCE)
    return {
        "activations": model.activation_bytes(1, context),
        "scores": _SCORES * 4 * int(config.num_attention_heads) * queries * context,
    }


def _processes(
    model: Model,
    held: dict[str, int],
    parts: dict[str, Work],
    workers: int,
    threads: int,
    gpus: int,
    rates: Rates,
    written: dict[str, int],
    note: str,
) -> Estimate:
    """The estimate of tasks that hold the model, and the steps of their work."""
    weights = {"weights": model.elements() * model.dtype.itemsize}
    if rates.forked is not None:
        weights["model code"] = _MODEL_CODE
    loading = {**weights, "model as it is loaded": model.stored_bytes() // 4}
    if gpus:
        host = {"load": {"process": rates.worker_bytes, "model as it is loaded": model.stored_bytes()}}
        device = {"measure": {"context": rates.device_bytes, **weights, **held}}
    else:
        freed = held["activations"] + held["scores"] + held["log probabilities"]
        host = {
            "load": {"process": rates.worker_bytes, **loading},
            "measure": with_retained({"process": rates.worker_bytes, **weights, **held}, freed),
        }
        device = {}
    process = Process("cache task", workers, threads, host, gpus, device)
    steps = tuple(
        Step(name, work.seconds(rates) / workers, work.seconds(rates)) for name, work in parts.items() if work != Work()
    )
    return Estimate((process,), steps, {}, 0, written, (note,))
