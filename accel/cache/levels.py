"""Levels of a cache: what each layer may keep, what it costs in bytes and what it does to the model's predictions.

A prompt attends to itself before its cache is compressed, so that one pass over it serves all mixtures of levels.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheLevel, CacheMethod
from hasten.accel.cache.cache import CompressedCache, TreePass
from hasten.accel.cache.full import Full
from hasten.accel.cache.mixed import Mixed, check_level
from hasten.accel.cache.sequence import SequenceCache
from hasten.accel.cache.statistics import Statistics, of_mixture
from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.compression.allocators.budgets import BudgetUnit
from hasten.accel.errors import UserError

# The level of each layer.
Mix = tuple[CacheLevel, ...]
KIND = "cache"


@dataclass(frozen=True)
class MixResult:
    """Of one mixture on one text. divergences: KL from the full cache at each predicted token, in nats.

    losses: negative log-likelihood of each of the text's own tokens. agreed: tokens whose most probable prediction is
    that of the full cache. held: bytes of each layer at the end of the prompt.
    """

    divergences: tuple[float, ...]
    losses: tuple[float, ...]
    agreed: int
    held: tuple[int, ...]


@dataclass(frozen=True)
class LevelResult:
    """Of one level in one layer, all others full. held: bytes at the end of the prompt. error: mean KL, in nats."""

    held: int
    error: float


@dataclass(frozen=True)
class _Prompt:
    """A prompt's cache before compression, by layer, and the logits (V,) behind its last token."""

    sequences: tuple[SequenceCache, ...]
    logits: Tensor


class MixMeasurement:
    """Measures mixtures on texts: windows (N, T), of which the first `context` tokens are the prompt.

    Prompts and the full cache's predictions are kept: a mixture costs a pass over the tokens behind the prompt, in
    pieces, between which the cache is compressed as it is when they are decoded one by one. statistics: calibrated ones
    of methods, by the names of their files; methods without take theirs from the prompts.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, context: int, statistics: Mapping[str, Statistics] | None = None
    ) -> None:
        if windows.ndim != 2 or not 1 <= context < windows.shape[1]:
            raise ValueError(f"need windows (N, T), T above context={context}, got {tuple(windows.shape)}")
        attach(model)
        self.model, self.windows, self.context, self._statistics = model, windows, context, statistics
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        # By window and by what methods read of a prompt's queries.
        self._prompts: dict[tuple[int, int, bool], _Prompt] = {}
        self._full: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def measure(self, mix: Mix, number: int) -> MixResult:
        """Divergence and bytes of a mixture, a level for each layer, on window `number`."""
        nothing = (CacheLevel(Full()),) * self.layers
        if number not in self._full:
            self._full[number] = self._predict(nothing, number)
        full = self._full[number][0]
        own, held = self._full[number] if mix == nothing else self._predict(mix, number)
        divergences = (full.exp() * (full - own)).sum(1).double()
        losses = -own.gather(1, self.windows[number, self.context :, None].to(own.device))[:, 0].double()
        agreed = int((full.argmax(1) == own.argmax(1)).sum())
        return MixResult(tuple(divergences.tolist()), tuple(losses.tolist()), agreed, held)

    def _predict(self, mix: Mix, number: int) -> tuple[Tensor, tuple[int, ...]]:
        """Log probabilities (T - context, V) of the tokens behind the prompt, and bytes of each layer."""
        method = Mixed(mix)
        statistics = of_mixture(method, self._statistics) if self._statistics else None
        cache = CompressedCache(self.model, method, statistics=statistics)
        prompts = [self._prompt(level.method, number) for level in mix]
        for layer, prompt in zip(cache.compressed, prompts, strict=True):
            sequence = prompt.sequences[layer.number].copy()
            sequence.method = layer.level.method
            layer.sequences, layer.is_initialized = [sequence], True
        cache.compress(0)
        held = tuple(layer.sequences[0].nbytes for layer in cache.compressed)
        parts, generated = [prompts[0].logits[None]], 0
        for piece in self.windows[number, self.context : -1].split(cache.interval(0)):
            parts.append(self._run(piece, cache, self.context + generated))
            generated += len(piece)
            cache.compress(0, generated=generated)
        return torch.cat(parts).float().log_softmax(-1), held

    def _prompt(self, method: CacheMethod, number: int) -> _Prompt:
        """The prompt as a method needs it."""
        key = number, method.query_window, method.sums_attention
        if key not in self._prompts:
            cache = CompressedCache(self.model, Full())
            for layer in cache.compressed:
                layer.sequences, layer.is_initialized = [SequenceCache(method)], True
            logits = self._run(self.windows[number, : self.context], cache, 0)[-1]
            self._prompts[key] = _Prompt(tuple(layer.sequences[0] for layer in cache.compressed), logits)
        return self._prompts[key]

    def _run(self, tokens: Tensor, cache: CompressedCache, start: int) -> Tensor:
        """Logits (N, V) of tokens (N,) at positions from `start` on, which are committed and not compressed."""
        count, device = len(tokens), self.model.device
        positions = torch.arange(start, start + count, dtype=torch.int32, device=device)
        cache.tree_pass = TreePass((0,), (None,), (positions,))
        kept = 1 if not start else 0  # behind a prompt, only the last logits are read
        with torch.no_grad():
            out = self.model(
                tokens[None].to(device), position_ids=positions[None].long(), past_key_values=cache, logits_to_keep=kept
            )
        for layer in cache.compressed:
            layer.sequences[0].commit()
        logits: Tensor = out.logits[0]
        return logits


def check_levels(levels: Mapping[str, CacheLevel]) -> None:
    """UserError where a level cannot be that of a single layer, or saves no bytes."""
    for name, level in levels.items():
        check_level(level)
        if not level.method.frees and not isinstance(level.method, Full):
            raise UserError(f"level {name} holds all tokens, and so saves no bytes: leave it out, or use full")


def alone(layer: int, level: CacheLevel, layers: int) -> Mix:
    """The mixture with all other layers full."""
    return tuple(level if number == layer else CacheLevel(Full()) for number in range(layers))


def quality(results: Sequence[MixResult], context: int) -> dict[str, float]:
    """Means of a mixture over texts, and bytes for each token of their prompts of `context` tokens."""
    tokens = sum(len(result.divergences) for result in results)
    return {
        "kl_divergence": math.fsum(value for result in results for value in result.divergences) / tokens,
        "perplexity": math.exp(math.fsum(value for result in results for value in result.losses) / tokens),
        "top1_agreement": sum(result.agreed for result in results) / tokens,
        "cache_bytes_per_token": max(sum(result.held) for result in results) / context,
    }


def level_result(layer: int, results: Sequence[MixResult]) -> LevelResult:
    """Of a level that was measured alone, on several texts."""
    divergences = [value for result in results for value in result.divergences]
    return LevelResult(max(result.held[layer] for result in results), math.fsum(divergences) / len(divergences))


def cache_units(results: Mapping[tuple[int, str], LevelResult], layers: int, tokens: int) -> list[Unit]:
    """A unit for each layer, with its levels by ascending bytes. results: by layer and level. tokens: of the prompt."""
    units = []
    for layer in range(layers):
        own = {level: result for (number, level), result in results.items() if number == layer}
        ordered = sorted(own, key=lambda level: (own[level].held, -own[level].error))
        choices = tuple(Choice(level, own[level].held * 8, own[level].error, own[level].held) for level in ordered)
        name = f"layers.{layer}"
        units.append(Unit(name, (name,), layer, KIND, tokens, choices))
    return units


@dataclass(frozen=True)
class CacheBytes(BudgetUnit):
    """Bytes that the cache holds for each token of the prompt; a budget up to 1 is a share of the full cache's.

    tokens: of the prompt. full: bytes of the full cache at its end.
    """

    tokens: int
    full: int

    name: ClassVar[str] = "bytes of cache per token"
    counts_bits: ClassVar[bool] = False

    def _limit(self, budget: Fraction, units: Sequence[Unit]) -> int:
        return int(budget * (self.full if budget <= 1 else self.tokens))

    def amount(self, cost: int, units: Sequence[Unit]) -> Fraction:
        """Bytes per token."""
        return Fraction(cost, self.tokens)


def uniform_divergence(points: Sequence[tuple[float, float]], size: float) -> float:
    """Divergence of uniform levels at a size, between the two nearest on the lower convex hull of (size, divergence).

    Layers at two levels, drawn by lot, have the divergence on the line between them where errors add up. Beyond the
    ends it is that of the end.
    """
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    if size <= hull[0][0]:
        return hull[0][1]
    for (left, high), (right, low) in itertools.pairwise(hull):
        if size <= right:
            return high + (low - high) * (size - left) / (right - left)
    return hull[-1][1]


def _turn(one: tuple[float, float], two: tuple[float, float], three: tuple[float, float]) -> float:
    """Above 0 where the path from one over two to three turns left."""
    return (two[0] - one[0]) * (three[1] - one[1]) - (two[1] - one[1]) * (three[0] - one[0])
