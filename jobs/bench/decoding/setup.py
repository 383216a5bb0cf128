"""Shared by all measurements of `hasten bench decode`: models, prompts, pass costs, and engines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hasten.accel.data.begin import begin_tokens
from hasten.accel.data.chat import end_of_turn
from hasten.accel.data.tokens import load_tokens
from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.drafters.heads.base import HEADS, HeadDrafter
from hasten.accel.decoding.engine import Engine, Request, Result
from hasten.accel.decoding.lengths.adaptive import Adaptive
from hasten.accel.decoding.lengths.base import LengthController
from hasten.accel.decoding.lengths.timing import PassCosts, measure_costs
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.verifiers.base import Verifier
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.acceptance import FILE as HEAD
from hasten.jobs.bench.decode import Config
from hasten.jobs.bench.decoding.conversations import OWN, ChatPrompts, is_conversations, read_conversations
from hasten.jobs.bench.measurements import methods
from hasten.jobs.cli.methods import method_names
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.markdown import table
from hasten.jobs.common.prompts import check_tokenizers, context_length, stop_ids
from hasten.jobs.common.tokenizer import load_tokenizer, vocabulary_size


class Generator(Protocol):
    """The method of a transformers model that benchmarks call."""

    def generate(self, prompt: Tensor, **options: object) -> Tensor:
        """Prompt (1, T) and new tokens, (1, T + new)."""


class Setup:
    """Models and prompts of a benchmark run.

    prompts: token ids by source of text, one prompt more than asked for, which warms up. chat: chat prompts by source.
    stop: ids that end an answer to one. model, assistant: target and draft model as transformers has them, None without
    a draft model. device: where they are. costs: seconds of a target pass by tree size. names: drafters of the speed
    table. omitted: by name, why a drafter is not among them.
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, self.device)
        target = resolve(config.target)
        draft, no_draft = _draft_model(config.draft, target)
        self.names, self.omitted = _chosen_drafters(config, target, draft, no_draft)
        tokenizer = load_tokenizer(target, config.template)
        if tokenizer is None:
            raise UserError(f"target={config.target} has no tokenizer: prompts are texts")
        self._tokenizer = tokenizer
        _check_labels(config.prompts)
        self.prompts = dict(self._prompts())
        self.chat = self._chat(target)
        end = end_of_turn(tokenizer)
        self.stop = tuple(sorted({*stop_ids(target, tokenizer), *([] if end is None else [end])}))

        def load(folder: Path) -> Generator:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            # Without end tokens every way to decode produces the same number of tokens.
            model.generation_config.eos_token_id = None
            loaded: Generator = model.to(self.device).eval()
            return loaded

        self.model, self.assistant = load(target), None if draft is None else load(draft)
        self._target = load_target(target, dtype, self.device, compiled=config.compiled)
        load_draft = None if draft is None else partial(load_target, draft, dtype, self.device, keeps_hidden=True)
        self._models = Models(self._target.vocabulary, load_draft, draft, self._target, target)
        self.costs = self._measure_costs()

    def _prompts(self) -> Iterator[tuple[str, list[list[int]]]]:
        config = self.config
        if not config.prompts:
            windows = load_tokens(
                "library",
                self._tokenizer,
                config.count + 1,
                128,
                split="held_out",
                seed=config.seed,
                begin=begin_tokens(self._tokenizer),
            )
            yield "library", windows.tolist()
        for source in config.prompts:
            if is_conversations(source):
                continue
            path, _, field = source.rpartition(":")
            try:
                with Path(path).open(encoding="utf-8") as file:
                    texts = [json.loads(line)[field] for _, line in zip(range(config.count + 1), file, strict=False)]
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"prompts={source} cannot be read: expected {OWN}, a JSON Lines file of messages, or FILE:FIELD of "
                    f"one of texts ({error!r})"
                ) from error
            if len(texts) < 2:
                raise UserError(f"prompts={source} has {len(texts)} lines, and 2 at least are needed")
            yield _label(source), [self._tokenizer(text)["input_ids"][-config.prompt_tokens :] for text in texts]

    def _chat(self, target: Path) -> dict[str, ChatPrompts]:
        config, vocabulary, context = self.config, vocabulary_size(target), context_length(target)
        sources = [source for source in config.prompts if is_conversations(source)]
        if min(config.chat_in_flight, default=0) < 1:
            raise UserError(f"chat_in_flight={config.chat_in_flight} is wrong: expected numbers of 1 or more")
        return {
            _label(source): read_conversations(
                source, self._tokenizer, vocabulary, config.per_category, config.max_new_tokens, context
            )
            for source in sources
        }

    def _measure_costs(self) -> PassCosts:
        """Costs for every number of sequences that is decoded at once."""
        config = self.config
        widths = [width for width in (1, 2, 4, 8, 16, 32, 64) if width <= 2 * config.max_draft_tokens]
        counts = {*([config.in_flight] if self.prompts else []), *(config.chat_in_flight if self.chat else [])}
        measured: dict[int, dict[int, float]] = {}
        for count in sorted(counts or {1}):
            measured |= measure_costs(self._target, widths, count).measured
        return PassCosts(measured)

    def omissions(self) -> list[str]:
        """A line below the speed table that names the drafters left out; empty if there are none."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.omitted.items():
            by_reason.setdefault(reason, []).append(name)
        return [f"Left out: {', '.join(names)} ({reason})." for reason, names in by_reason.items()]

    def drafter(self, name: str, **options: object) -> Drafter:
        """A drafter by name; options replace its hyper-parameters."""
        if name == "specdec_pp":
            options = {"head": self.config.head, **options}
        return methods.drafter(name, **options)

    def engine(
        self,
        drafter: Drafter | None,
        in_flight: int = 1,
        policy: LengthController | None = None,
        verifier: Verifier | None = None,
        stop: Iterable[int] = (),
    ) -> Engine:
        """Engine on the target; without a policy the draft length adapts to the measured costs."""
        if drafter is not None and policy is None:
            policy = Adaptive().start(lambda: self.costs, self.config.max_draft_tokens)
        return Engine(
            self._target, drafter, verifier, models=self._models, policy=policy, stop=stop, in_flight=in_flight
        )

    def requests(self, prompts: Sequence[list[int]], temperature: float = 0.0) -> list[Request]:
        """A request for each prompt; its number is its id and seed."""
        new, sampling = self.config.max_new_tokens, Sampling(temperature)
        return [Request(str(index), ids, new, sampling, seed=index) for index, ids in enumerate(prompts)]

    def costs_table(self) -> str:
        """Table of the time of a target pass."""
        counts = list(self.costs.measured)
        widths = list(self.costs.measured[1])
        rows = [
            [f"{count} in flight", *(f"{1e3 * self.costs.measured[count][width]:.2f}" for width in widths)]
            for count in counts
        ]
        rows.append(["target efficiency, 1", *(f"{self.costs.efficiency(width):.2f}" for width in widths)])
        return "Milliseconds of a pass by tokens of each sequence, 128 tokens in the cache:\n\n" + table(
            ["sequences", *map(str, widths)], rows
        )


def _label(source: str) -> str:
    """Name of a source of prompts in tables and report keys."""
    return Path(source if is_conversations(source) else source.rpartition(":")[0] or source).stem


def _check_labels(sources: Sequence[str]) -> None:
    labels = [_label(source) for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"prompts={','.join(sources)} has two files of the name {twice}, which names the tables of one")


def _draft_model(draft: str | None, target: Path) -> tuple[Path | None, str]:
    """Folder of the draft model, and if there is none the reason; UserError if one that was named does not fit."""
    if draft is None:
        return None, "draft=null"
    folder = resolve(draft)
    try:
        check_tokenizers(target, folder)
    except UserError:
        if draft != Config().draft:
            raise
        return None, f"the default draft={draft} has another tokenizer or vocabulary than the target; give draft=PATH"
    return folder, ""


def _chosen_drafters(
    config: Config, target: Path, draft: Path | None, no_draft: str
) -> tuple[list[str], dict[str, str]]:
    """Drafters to compare, and by name why others are left out; UserError for a name that cannot be compared."""
    known = method_names("drafter")
    unknown = [name for name in config.drafters if name not in known]
    if unknown:
        raise UserError(f"drafters={unknown[0]} is wrong: expected any of {', '.join(known)}")
    omitted = {}
    for name in config.drafters or known:
        made = methods.drafter(name)
        if draft is None and made.needs_draft_model:
            omitted[name] = no_draft
        elif draft is not None and made.needs_hidden and config.head is None and not (draft / HEAD).is_file():
            omitted[name] = f"there is no acceptance head at {draft / HEAD}; train one with hasten train_drafter"
        elif not _has_heads(made, target):
            # Without the path, because the table says it.
            omitted[name] = f"the target's folder has no {HEADS}/NAME; train heads with hasten train"
    if config.drafters and omitted:
        name, reason = next(iter(omitted.items()))
        raise UserError(f"drafters={name} cannot be compared: {reason}")
    return [name for name in config.drafters or known if name not in omitted], omitted


def _has_heads(drafter: Drafter, target: Path) -> bool:
    """Whether the heads of a drafter, or of the members of one, are in the target's folder."""
    if isinstance(drafter, Combined):
        return all(_has_heads(member, target) for member in drafter.drafters)
    if isinstance(drafter, HeadDrafter):
        try:
            drafter.folder(target)
        except UserError:
            return False
    return True


def total(results: Iterable[Result]) -> DecodingStats:
    """Decoding statistics summed over results."""
    return DecodingStats.total(result.stats for result in results)


def mean_acceptance_length(stats: DecodingStats) -> float:
    """Tokens per target pass."""
    length: float = stats.metrics()["mean_acceptance_length"]
    return length
