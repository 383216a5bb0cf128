"""Tokens per second of every drafter and of transformers' own decoding; sequences in flight."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time

import torch

from hasten.accel.decoding.engine import Result
from hasten.jobs.bench.decoding.setup import Setup, total
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress

_LOG = logging.getLogger(__name__)
_GENERATE, _LOOKUP, _ASSISTED = "transformers generate", "transformers, prompt lookup", "transformers, assisted"
_PLAIN = "hasten, plain"


@dataclass
class Row:
    """One way of decoding: CPU seconds, tokens, and in `same` the prompts with the same tokens as generate.

    passes: of the target, 0 for transformers. drafted: tokens per pass. target_share: of the time.
    """

    name: str
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    same: int = 0
    drafted: float = 0.0
    target_share: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per CPU second."""
        return self.tokens / self.seconds

    def add(self, seconds: float, tokens: list[int], expected: list[int]) -> None:
        """Count a prompt."""
        self.seconds += seconds
        self.tokens += len(tokens)
        self.same += tokens == expected


def compare(setup: Setup, prompts: Sequence[list[int]]) -> tuple[list[Row], float]:
    """A row for each way to decode, and the share of distinct tokens in the output.

    Every prompt is decoded in all ways before the next one, so that other load on the machine affects all alike. Each
    drafter keeps its memory, and the draft length policy its statistics, from prompt to prompt.
    """
    engines = {_PLAIN: setup.engine(None)}
    engines |= {name: setup.engine(setup.drafter(name)) for name in setup.names}
    peers: dict[str, dict[str, object]] = {
        _GENERATE: {},
        _LOOKUP: {"prompt_lookup_num_tokens": 10},
    }
    if setup.assistant is not None:
        peers[_ASSISTED] = {"assistant_model": setup.assistant}
    rows = {name: Row(name) for name in (*peers, *engines)}
    results: dict[str, list[Result]] = {name: [] for name in engines}
    distinct = 0.0
    with Progress("decoding", len(prompts) - 1, "prompt") as progress:
        # The first prompt warms everything up and is not counted.
        for index, ids in enumerate(prompts):
            expected = None
            for name, options in peers.items():
                started = process_time()
                tokens = _generate(setup, ids, options)
                seconds = process_time() - started
                expected = expected or tokens
                if index:
                    rows[name].add(seconds, tokens, expected)
            assert expected is not None
            for name, engine in engines.items():
                started = process_time()
                result = next(iter(engine.decode(setup.requests([ids]))))
                seconds = process_time() - started
                if index:
                    rows[name].add(seconds, result.token_ids, expected)
                    results[name].append(result)
            distinct += len(set(expected)) / len(expected) / (len(prompts) - 1) if index else 0.0
            gc.collect()
            progress.update(index, f"{rows[_PLAIN].rate:.0f} tokens/s plain" if index else "")
    for name, decoded in results.items():
        stats = total(decoded)
        rows[name].passes = stats.num_spec_steps
        rows[name].drafted = stats.num_draft_tokens / stats.num_spec_steps
        rows[name].target_share = stats.metrics()["target_share"]
    return list(rows.values()), distinct


def _generate(setup: Setup, ids: list[int], options: Mapping[str, object]) -> list[int]:
    """The new tokens of transformers' greedy `generate`; options select prompt lookup or an assistant model."""
    prompt = torch.tensor([ids], device=setup.device)
    output = setup.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=setup.config.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def speed_table(label: str, rows: Sequence[Row], prompts: int, new: int, distinct: float) -> str:
    """Table of `compare`; label: of the prompts. new: tokens of each output."""
    by_name = {row.name: row for row in rows}
    generate, plain = by_name[_GENERATE], by_name[_PLAIN]
    assisted = max(by_name[name].rate for name in (_LOOKUP, _ASSISTED) if name in by_name)
    lines = [
        [
            row.name,
            f"{row.rate:.0f}",
            f"{row.rate / generate.rate:.2f}",
            f"{row.rate / assisted:.2f}",
            f"{row.rate / plain.rate:.2f}",
            f"{row.tokens / row.passes:.2f}" if row.passes else "",
            f"{row.drafted:.1f}" if row.passes else "",
            f"{row.target_share:.0%}" if row.passes else "",
            f"{row.same} of {prompts}",
        ]
        for row in rows
    ]
    head = [
        "",
        "tokens/s",
        "generate",
        "best assisted",
        "our plain",
        "tokens/pass",
        "drafted/pass",
        "time in target",
        "same tokens",
    ]
    return (
        f"**{label}**: {prompts} prompts, {new} greedy tokens each, batch 1, CPU time; columns three to five are "
        f"ratios of tokens per second. Share of distinct tokens in an output: {distinct:.0%}.\n\n" + table(head, lines)
    )


def speed_metrics(label: str, rows: Sequence[Row]) -> dict[str, float]:
    """Report keys `LABEL.WAY.tokens_per_second` and `.same`."""
    metrics = {}
    for row in rows:
        name = row.name.replace(", ", "_").replace(" ", "_")
        metrics[f"{label}.{name}.tokens_per_second"] = row.rate
        metrics[f"{label}.{name}.same"] = float(row.same)
    return metrics


def in_flight(setup: Setup, prompts: Sequence[list[int]]) -> dict[str, tuple[float, float]]:
    """Tokens per CPU second with one sequence and with several in flight, by drafter."""
    rates = {}
    for name in ("plain", "prompt_lookup", *(["union"] if "union" in setup.names else [])):
        _LOG.info("in flight: %s", name)
        measured = []
        for count in (1, setup.config.in_flight):
            engine = setup.engine(None if name == "plain" else setup.drafter(name), count)
            started = process_time()
            tokens = sum(len(result.token_ids) for result in engine.decode(setup.requests(prompts)))
            measured.append(tokens / (process_time() - started))
        rates[name] = measured[0], measured[1]
    return rates


def in_flight_table(rates: Mapping[str, tuple[float, float]], count: int) -> str:
    """Table of `in_flight`; count: sequences in flight."""
    rows = [[name, f"{one:.0f}", f"{many:.0f}", f"{many / one:.2f}"] for name, (one, many) in rates.items()]
    return f"Tokens per second with {count} sequences in flight:\n\n" + table(["", "1", str(count), "ratio"], rows)
