"""Runs prompts for methods that read them, see prompt/base.py: in the decoding engine, and in front of `generate()`.

attach(model)  # of attention.py
cache = CompressedCache(model, SpecKV(), CacheBudget(0.25))
prefill(model, cache, ids, max_new_tokens=100, draft=draft)
model.generate(ids, past_key_values=cache, max_new_tokens=100)
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheMethod, Kept
from hasten.accel.cache.cache import CompressedCache, TreePass
from hasten.accel.cache.draft import DraftModel
from hasten.accel.cache.prompt.base import Drafting, Prompt, PromptMethod, Reading, takes_contexts
from hasten.accel.cache.prompt.hydragen import common_length, share
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.sequence import SequenceCache
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.models.loading_needs import register_loader

_CHUNK = 512


def load_draft(method: CacheMethod | None, dtype: torch.dtype, device: str) -> PreTrainedModel | None:
    """The draft model that a method names; None where it names none, and where it has no use for one."""
    if not isinstance(method, Drafting) or method.draft is None:
        return None
    folder = resolve(method.draft)
    register_loader(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


class Prompts:
    """Runs prompts of the sequences of a cache, one after the other. draft: None is the model itself."""

    def __init__(self, model: PreTrainedModel, cache: CompressedCache, draft: PreTrainedModel | None = None) -> None:
        assert isinstance(cache.method, PromptMethod)
        self._model, self._cache, self._method = model, cache, cache.method
        self._draft = None
        if self._method.drafts:
            self._draft = DraftModel(draft or model, model.config.get_text_config().vocab_size)

    def read(self, prompt: Prompt) -> Reading:
        """How the method wants the prompt to run; UserError where it lacks contexts, or has no use for them."""
        check_contexts(self._method, prompt.contexts)
        bounds = (-1, *prompt.contexts, prompt.length + 1)
        if any(start >= stop for start, stop in pairwise(bounds)):
            raise UserError(f"contexts={prompt.contexts} must ascend, up to the {prompt.length} tokens that run first")
        given = self._cache.budget
        budget = None if given is None or given.in_bytes else given.tokens(prompt.length)
        with torch.no_grad():
            return self._method.read(prompt, self._draft, budget)

    def run(
        self,
        row: int,
        prompt: Prompt,
        reading: Reading,
        others: Mapping[int, Sequence[int]],
        chunk: int = _CHUNK,
    ) -> Tensor | None:
        """Commit a prompt to an empty sequence; returns the logits (V,) behind its last token, None if none ran.

        others: committed ids of other sequences of the cache, with which it may share its first tokens.
        """
        tokens, first = prompt.tokens[: prompt.length], 0
        if prompt.contexts:
            first = self._run_contexts(row, prompt, chunk)
        elif self._method.shared_tokens is not None:
            first = self._share(row, tokens, others, self._method.shared_tokens)
        kept = range(len(tokens)) if reading.kept is None else reading.kept
        indices = [index for index in kept if index >= first]
        return self._run_chain(row, tokens, indices, prompt.saved_positions, chunk)

    def look_ahead(self, row: int, tokens: Sequence[int], start: int) -> None:
        """Let the method see the queries of tokens behind a prompt, the first at position `start`, and drop them."""
        if not tokens:
            return
        positions = torch.arange(start, start + len(tokens), dtype=torch.int32, device=self._model.device)
        self._pass(row, tokens, positions)
        for sequence in self._sequences(row):
            sequence.look_ahead(positions)

    def _run_chain(
        self, row: int, tokens: Sequence[int], indices: Sequence[int], lower: int, chunk: int
    ) -> Tensor | None:
        """Commit the tokens of these indices, at positions that are lower than them; returns the last logits (V,)."""
        logits = None
        for begin in range(0, len(indices), chunk):
            part = indices[begin : begin + chunk]
            positions = torch.tensor(part, dtype=torch.int32, device=self._model.device) - lower
            logits = self._pass(row, [tokens[index] for index in part], positions)
            self._commit(row)
        return logits

    def _run_contexts(self, row: int, prompt: Prompt, chunk: int) -> int:
        """Commit what comes before the contexts, and the contexts; returns the index behind them."""
        tokens, first, end = prompt.tokens, prompt.contexts[0], prompt.contexts[-1]
        self._run_chain(row, tokens, range(first), 0, chunk)
        for start, stop in pairwise(prompt.contexts):
            for begin in range(start, stop, chunk):
                part = range(begin, min(stop, begin + chunk))
                # Nodes that wait are the tokens of all contexts; each sees those of its own up to itself.
                above = torch.zeros(len(part), part.stop - first, dtype=torch.bool, device=self._model.device)
                above[:, start - first :] = True
                above[:, begin - first :].tril_()
                positions = torch.tensor(part, dtype=torch.int32, device=self._model.device) - (start - first)
                self._pass(row, tokens[part.start : part.stop], positions, above)
        self._commit(row)
        for sequence in self._sequences(row):
            recent = sequence.uncompressed()
            assert recent is not None
            held = recent.keys, recent.values, recent.positions.expand(len(recent.keys), -1)
            before = [] if not first else [Dense(*(part[:, :first].clone() for part in held))]
            contexts = self._method.contexts(*(part[:, first:].clone() for part in held))
            sequence.keep(Kept([*before, contexts], 0))
        return end

    def _share(self, row: int, tokens: Sequence[int], others: Mapping[int, Sequence[int]], shortest: int) -> int:
        """Number of first tokens that the sequence now holds together with another one."""
        lengths = {other: common_length(tokens, ids) for other, ids in others.items()}
        giver = max(lengths, key=lengths.__getitem__, default=None)
        if giver is None or lengths[giver] < shortest:
            return 0
        held = 0
        for layer in self._cache.compressed:
            all_of = layer.sequences
            held = share(all_of, all_of[giver], all_of[row], lengths[giver], shortest)
        return held

    def _pass(self, row: int, tokens: Sequence[int], positions: Tensor, above: Tensor | None = None) -> Tensor:
        """Run tokens of a sequence as waiting nodes; returns the logits (V,) of the last. above: see NewTokens."""
        self._cache.tree_pass = TreePass((row,), [above], [positions])
        ids = torch.tensor([list(tokens)], device=self._model.device)
        with torch.no_grad():
            out = self._model(
                ids,
                position_ids=positions[None].long(),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache.tree_pass = None
        logits: Tensor = out.logits[0, -1]
        return logits

    def _commit(self, row: int) -> None:
        for sequence in self._sequences(row):
            sequence.commit()

    def _sequences(self, row: int) -> Iterable[SequenceCache]:
        return (layer.sequences[row] for layer in self._cache.compressed)


def check_contexts(method: CacheMethod | None, contexts: Sequence[int]) -> None:
    """UserError where a method lacks contexts, or has no use for them."""
    takes = takes_contexts(method)
    name = "full" if method is None else type(method).__name__
    if takes and len(contexts) < 2:
        raise UserError(f"cache={name} reads contexts beside the prompt: give at least one, in the field contexts")
    if contexts and not takes:
        raise UserError(f"cache={name} has no use for contexts: leave them out, or give cache=ape")


def prefill(
    model: PreTrainedModel,
    cache: CompressedCache,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    contexts: Sequence[int] = (),
    draft: PreTrainedModel | None = None,
    leave: int = 1,
) -> Tensor:
    """Fill a new cache with prompts (B, T), but for their last `leave` tokens, which `generate()` needs.

    Returns logits (B, V) behind the last token of each that ran; nan for a sequence of which none did. contexts: see
    Prompt, the same for all sequences. With them, `generate()` gets the last `cache.get_seq_length() + leave` of the
    ids. draft: draft model of methods that ask one; None is the model itself.
    """
    attach(model)
    prompts = Prompts(model, cache, draft)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for layer in cache.compressed:
        layer.sequences = [layer.new_sequence() for _ in range(len(ids))]
        layer.is_initialized = True
    done: dict[int, Sequence[int]] = {}
    rows = []
    for row, (own, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        following = int(real[len(real) - leave :].sum())
        prompt = Prompt(own[real].tolist(), following, max_new_tokens, tuple(contexts))
        reading = prompts.read(prompt)
        rows.append(prompts.run(row, prompt, reading, done))
        prompts.look_ahead(row, reading.lookahead, prompt.length - prompt.saved_positions)
        done[row] = prompt.tokens[: prompt.length]
        for layer in cache.compressed:
            cache.prompts[layer.number, row] = layer.sequences[row].length
            layer.seen = ids.shape[1] - leave - prompt.saved_positions
        cache.compress(row)
    cache.filled = True
    size = model.config.get_text_config().vocab_size
    return torch.stack([ids.new_full((size,), torch.nan, dtype=model.dtype) if row is None else row for row in rows])
