"""Tokens per second of every drafter and of transformers' own decoding; sequences in flight."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time

import torch

from hasten.accel.decoding.stats import DecodingStats
from hasten.jobs.bench.decoding.setup import Setup
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress

_LOG = logging.getLogger(__name__)
# Ways to decode besides the drafters.
GENERATE, LOOKUP, ASSISTED = "transformers generate", "transformers, prompt lookup", "transformers, assisted"
PLAIN = "hasten, plain"


@dataclass(frozen=True)
class Sample:
    """A prompt decoded in one way. same: whether the tokens are generate's. stats: None for transformers."""

    seconds: float
    token_ids: list[int]
    same: bool
    stats: DecodingStats | None = None


@dataclass(frozen=True)
class Row:
    """A way of decoding over several prompts: CPU seconds, tokens, and in `same` the prompts with generate's tokens.

    stats: of hasten's decoding; None for transformers.
    """

    name: str
    seconds: float
    tokens: int
    same: int
    stats: DecodingStats | None = None

    @classmethod
    def total(cls, name: str, samples: Sequence[Sample]) -> "Row":
        """Sums over samples of one way."""
        stats = [sample.stats for sample in samples if sample.stats is not None]
        return cls(
            name,
            sum(sample.seconds for sample in samples),
            sum(len(sample.token_ids) for sample in samples),
            sum(sample.same for sample in samples),
            DecodingStats.total(stats) if stats else None,
        )

    @property
    def rate(self) -> float:
        """Tokens per CPU second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per target pass of a sequence; None for transformers."""
        return self.tokens / self.stats.num_spec_steps if self.stats else None


def compare(setup: Setup, prompts: Sequence[list[int]]) -> tuple[list[Row], float]:
    """A row for each way to decode, and the share of distinct tokens in the output; the first prompt warms up."""
    samples = measure(setup, prompts)
    return [Row.total(name, of_way) for name, of_way in samples.items()], distinct(samples)


def distinct(samples: Mapping[str, Sequence[Sample]]) -> float:
    """Mean share of distinct tokens in an output of generate."""
    shares = [len(set(sample.token_ids)) / len(sample.token_ids) for sample in samples[GENERATE]]
    return sum(shares) / len(shares)


def measure(setup: Setup, prompts: Sequence[list[int]], stop: Sequence[int] = ()) -> dict[str, list[Sample]]:
    """A sample of each prompt but the first for each way to decode; the first one warms everything up.

    Every prompt is decoded in all ways before the next one, so that other load on the machine affects all alike. Each
    drafter keeps its memory, and the draft length policy its statistics, from prompt to prompt. stop: ids that end a
    sequence; without any, every way decodes max_new_tokens tokens.
    """
    engines = {PLAIN: setup.engine(None, stop=stop)}
    engines |= {name: setup.engine(setup.drafter(name), stop=stop) for name in setup.names}
    peers: dict[str, dict[str, object]] = {
        GENERATE: {},
        LOOKUP: {"prompt_lookup_num_tokens": 10},
    }
    if setup.assistant is not None:
        peers[ASSISTED] = {"assistant_model": setup.assistant}
    samples: dict[str, list[Sample]] = {name: [] for name in (*peers, *engines)}
    with Progress("decoding", len(prompts) - 1, "prompt") as progress:
        for index, ids in enumerate(prompts):
            expected = None
            measured: dict[str, Sample] = {}
            for name, options in peers.items():
                started = process_time()
                [tokens] = generate_tokens(setup, [ids], stop, options)
                seconds = process_time() - started
                expected = expected or tokens
                measured[name] = Sample(seconds, tokens, tokens == expected)
            for name, engine in engines.items():
                started = process_time()
                result = next(iter(engine.decode(setup.requests([ids]))))
                seconds = process_time() - started
                measured[name] = Sample(seconds, result.token_ids, result.token_ids == expected, result.stats)
            if index:
                for name, sample in measured.items():
                    samples[name].append(sample)
            gc.collect()
            progress.update(index, f"{Row.total(PLAIN, samples[PLAIN]).rate:.0f} tokens/s plain" if index else "")
    return samples


def generate_tokens(
    setup: Setup, prompts: Sequence[list[int]], stop: Sequence[int] = (), options: Mapping[str, object] | None = None
) -> list[list[int]]:
    """The new tokens of transformers' greedy `generate` for a batch of prompts, each up to its first stop token.

    options: of `generate`, which select prompt lookup or an assistant model.
    """
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=setup.device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=setup.device)
    mask = torch.arange(width, device=setup.device) >= width - lengths[:, None]
    output = setup.model.generate(
        padded,
        attention_mask=mask.long(),
        max_new_tokens=setup.config.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **({"eos_token_id": list(stop)} if stop else {}),
        **(options or {}),
    )
    return [_until_stop(row, stop) for row in output[:, width:].tolist()]


def _until_stop(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """The tokens to the first stop token, that included; what a batch adds after it is padding."""
    ends = [index for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def speed_table(label: str, rows: Sequence[Row], prompts: int, new: str, distinct_share: float) -> str:
    """Table of `compare`; label: of the prompts. new: tokens of each output, in words."""
    by_name = {row.name: row for row in rows}
    generate, plain = by_name[GENERATE], by_name[PLAIN]
    assisted = max(by_name[name].rate for name in (LOOKUP, ASSISTED) if name in by_name)
    lines = [
        [
            row.name,
            f"{row.rate:.1f}",
            f"{row.rate / generate.rate:.2f}",
            f"{row.rate / assisted:.2f}",
            f"{row.rate / plain.rate:.2f}",
            *_pass_cells(row),
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
        f"**{label}**: {prompts} prompts, {new}, batch 1, CPU time with that of the prompt; columns three to five are "
        f"ratios of tokens per second. Share of distinct tokens in an output: {distinct_share:.0%}.\n\n"
        + table(head, lines)
    )


def _pass_cells(row: Row) -> list[str]:
    """Tokens and drafted tokens per pass, and the share of the time in the target; empty for transformers."""
    if row.stats is None:
        return ["", "", ""]
    drafted = row.stats.num_draft_tokens / row.stats.num_spec_steps
    return [f"{row.tokens_per_pass:.2f}", f"{drafted:.1f}", f"{row.stats.metrics()['target_share']:.0%}"]


def speed_metrics(label: str, rows: Sequence[Row]) -> dict[str, float]:
    """Report keys `LABEL.WAY.tokens_per_second` and `.same`."""
    metrics = {}
    for row in rows:
        metrics[f"{label}.{metric_name(row.name)}.tokens_per_second"] = row.rate
        metrics[f"{label}.{metric_name(row.name)}.same"] = float(row.same)
    return metrics


def metric_name(way: str) -> str:
    """Part of a report key that names a way to decode."""
    return way.replace(", ", "_").replace(" ", "_")


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
