"""What a cache method costs and saves: divergence from the full cache on text, recall, bytes at every step, time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.prompts import load_draft, prefill
from hasten.accel.cache.statistics import Statistics
from hasten.accel.evaluation.recall import Sample

# Parts of a prompt that are contexts of their own for methods that read contexts side by side.
_CONTEXTS = 4


@dataclass(frozen=True)
class TextSums:
    """Sums over predicted tokens.

    divergence: KL(full cache || method), in nats. loss: negative log-likelihood of the text's own tokens. agreed:
    tokens whose most probable prediction is that of the full cache.
    """

    tokens: int
    divergence: float
    loss: float
    agreed: int

    def metrics(self) -> dict[str, float]:
        """Means."""
        return {
            "kl_divergence": self.divergence / self.tokens,
            "perplexity": math.exp(self.loss / self.tokens),
            "top1_agreement": self.agreed / self.tokens,
        }


class FullPredictions:
    """What a model predicts with the full cache: the same for all methods, so that each window is run once.

    windows: (N, T) of text, of which `context` tokens are the prompt.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, context: int) -> None:
        self.windows, self.context = windows, context
        self._measurement = CacheMeasurement(model, Full(), None)
        self._known: dict[int, Tensor] = {}

    def log_probs(self, number: int) -> Tensor:
        """Log probabilities (T - context, V) of the tokens behind the context of a window, on the CPU."""
        if number not in self._known:
            self._known[number] = self._measurement.log_probs(self.windows[number], self.context)[0].cpu()
        return self._known[number]


class CacheMeasurement:
    """Measures a method on one model. budget: None for methods that have none.

    statistics: see CompressedCache. draft: see prompts.prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: CacheMethod,
        budget: CacheBudget | None,
        statistics: Statistics | None = None,
        draft: PreTrainedModel | None = None,
    ) -> None:
        attach(model)
        self.model, self.method, self.budget = model, method, budget
        self.statistics, self.draft = statistics, draft
        # Bytes held after the prompt and after each step, of the last text.
        self.bytes_at: list[int] = []
        self.seconds = self.cpu_seconds = 0.0
        self.steps = 0

    def text(self, reference: FullPredictions) -> TextSums:
        """Predict the tokens behind the context of each window, one at a time."""
        total = TextSums(0, 0.0, 0.0, 0)
        for number, window in enumerate(reference.windows):
            own, self.bytes_at = self.log_probs(window, reference.context)
            full, targets = reference.log_probs(number).to(own.device), window[reference.context :]
            total = TextSums(
                total.tokens + len(targets),
                total.divergence + float((full.exp() * (full - own)).sum()),
                total.loss - float(own.gather(1, targets[:, None]).sum()),
                total.agreed + int((full.argmax(1) == own.argmax(1)).sum()),
            )
        return total

    def recall(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """Share of the answers' tokens that are the most probable ones, each behind the right ones, and of answers.

        An answer counts if all of its tokens do.
        """
        answers = [right for sample in samples for right in self._answers(sample)]
        tokens = [right for answer in answers for right in answer]
        return sum(tokens) / len(tokens), sum(map(all, answers)) / len(answers)

    def _answers(self, sample: Sample) -> list[list[bool]]:
        """Whether each token of each answer is right."""
        cache = self._cache()
        self._begin(sample.context, cache, sum(len(turn.question) + len(turn.answer) for turn in sample.turns))
        right = []
        for turn in sample.turns:
            # One by one, as they are decoded: what is compressed between them is what a server would have compressed.
            logits = [self._run([token], cache) for token in (*turn.question, *turn.answer)]
            first = len(turn.question) - 1
            predicted = [int(part.argmax()) for part in logits[first:-1]]
            right.append([found == token for found, token in zip(predicted, turn.answer, strict=True)])
        return right

    def log_probs(self, window: Tensor, context: int) -> tuple[Tensor, list[int]]:
        """Log probabilities (T - context, V) of the tokens behind the context, and the bytes held at each step."""
        cache = self._cache()
        parts = [self._begin(window[:context].tolist(), cache, len(window) - context)]
        held = [cache.nbytes]
        for token in window[context:-1].tolist():
            begun, counted = perf_counter(), process_time()
            parts.append(self._run([token], cache))
            self.seconds += perf_counter() - begun
            self.cpu_seconds += process_time() - counted
            self.steps += 1
            held.append(cache.nbytes)
        return torch.stack(parts).float().log_softmax(-1), held

    def _cache(self) -> CompressedCache:
        return CompressedCache(self.model, self.method, self.budget, self.statistics)

    def _begin(self, tokens: Sequence[int], cache: CompressedCache, new: int) -> Tensor:
        """Logits (V,) behind a prompt, after which `new` tokens are decoded."""
        if not isinstance(cache.method, PromptMethod):
            return self._run(tokens, cache)
        ids = torch.tensor([list(tokens)], device=self.model.device)
        contexts: list[int] = []
        if cache.method.takes_contexts:
            # Behind the first token, which all see; the last one asks.
            contexts = [1 + part * (len(tokens) - 2) // _CONTEXTS for part in range(_CONTEXTS + 1)]
        return prefill(self.model, cache, ids, max_new_tokens=new, contexts=contexts, draft=self.draft, leave=0)[0]

    def _run(self, tokens: Sequence[int], cache: CompressedCache) -> Tensor:
        """Logits (V,) behind the last of the tokens."""
        with torch.no_grad():
            ids = torch.tensor([list(tokens)], device=self.model.device)
            logits: Tensor = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return logits


def measure(
    model: PreTrainedModel,
    method: CacheMethod,
    budget: CacheBudget | None,
    reference: FullPredictions | None,
    recall: Mapping[str, Sequence[Sample]],
    progress: Callable[[str], None] = lambda _: None,
    statistics: Statistics | None = None,
) -> dict[str, Any]:
    """One row of a report. reference: of the same model, None to leave text out. recall: samples by task."""
    draft = load_draft(method, model.dtype, str(model.device))
    measurement = CacheMeasurement(model, method, budget, statistics, draft)
    row: dict[str, Any] = {}
    if reference is not None:
        progress("text")
        row |= measurement.text(reference).metrics()
        row["bytes_at"] = measurement.bytes_at
        row["bytes_end"] = measurement.bytes_at[-1]
        row["tokens_per_second"] = measurement.steps / measurement.seconds if measurement.seconds else None
        row["cpu_seconds_per_token"] = measurement.cpu_seconds / measurement.steps if measurement.steps else None
    for task, samples in recall.items():
        progress(task)
        row[f"recall_{task}"], row[f"answers_{task}"] = measurement.recall(samples)
    return row
