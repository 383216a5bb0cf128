"""Speculative decoding of chat prompts: tokens per pass and speed by category, and with sequences in flight."""

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import process_time

from hasten.accel.decoding.stats import DecodingStats
from hasten.jobs.bench.decoding.conversations import ChatPrompts
from hasten.jobs.bench.decoding.setup import Setup
from hasten.jobs.bench.decoding.speed import GENERATE, PLAIN, Row, Sample, generate_tokens, metric_name
from hasten.jobs.common.markdown import table

_LOG = logging.getLogger(__name__)
ALL = "all"


def by_category(samples: Mapping[str, Sequence[Sample]], prompts: ChatPrompts) -> dict[str, dict[str, Row]]:
    """A row of each way to decode for each category, and for `all` prompts."""
    indices = {**prompts.by_category, ALL: list(range(len(prompts.tokens)))}
    return {
        category: {way: Row.total(way, [of_way[index] for index in chosen]) for way, of_way in samples.items()}
        for category, chosen in indices.items()
    }


def in_flight(setup: Setup, prompts: ChatPrompts, samples: Mapping[str, Sequence[Sample]]) -> dict[int, dict[str, Row]]:
    """A row of each way to decode by the number of sequences in flight; `same` counts the tokens of plain decoding.

    samples: of one sequence at a time. transformers decodes batches that end with their longest answer, hasten begins
    the next prompt as soon as one has ended. A way's prompts are decoded one way after the other.
    """
    expected = [sample.token_ids for sample in samples[PLAIN]]
    rows: dict[int, dict[str, Row]] = {}
    for count in setup.config.chat_in_flight:
        if count == 1:
            rows[count] = {way: _row(way, of_way, expected) for way, of_way in samples.items()}
            continue
        _LOG.info("%d chat prompts in flight", count)
        rows[count] = {GENERATE: _generated(setup, prompts, count, expected)}
        for way in (PLAIN, *setup.names):
            rows[count][way] = _decoded(setup, prompts, count, way, expected)
            gc.collect()
    return rows


def _row(way: str, samples: Sequence[Sample], expected: Sequence[list[int]]) -> Row:
    return replace(Row.total(way, samples), same=_same((sample.token_ids for sample in samples), expected))


def _generated(setup: Setup, prompts: ChatPrompts, count: int, expected: Sequence[list[int]]) -> Row:
    started = process_time()
    outputs: list[list[int]] = []
    for first in range(0, len(prompts.tokens), count):
        outputs += generate_tokens(setup, prompts.tokens[first : first + count], setup.stop)
    seconds = process_time() - started
    return Row(GENERATE, seconds, sum(map(len, outputs)), _same(outputs, expected))


def _decoded(setup: Setup, prompts: ChatPrompts, count: int, way: str, expected: Sequence[list[int]]) -> Row:
    engine = setup.engine(None if way == PLAIN else setup.drafter(way), count, stop=setup.stop)
    next(iter(engine.decode(setup.requests([prompts.warm_up]))))
    started = process_time()
    results = sorted(engine.decode(setup.requests(prompts.tokens)), key=lambda result: int(result.id))
    seconds = process_time() - started
    outputs = [result.token_ids for result in results]
    stats = DecodingStats.total(result.stats for result in results)
    return Row(way, seconds, sum(map(len, outputs)), _same(outputs, expected), stats)


def _same(outputs: Iterable[list[int]], expected: Iterable[list[int]]) -> int:
    return sum(output == tokens for output, tokens in zip(outputs, expected, strict=True))


def category_tables(rows: Mapping[str, Mapping[str, Row]], prompts: ChatPrompts) -> list[str]:
    """Tokens per pass, and tokens per second over plain decoding and over generate, by category."""
    ways = list(rows[ALL])
    drafters = [way for way, row in rows[ALL].items() if row.stats is not None and way != PLAIN]
    chosen = {**prompts.by_category, ALL: range(len(prompts.tokens))}
    passes = [
        [
            category,
            f"{sum(len(prompts.tokens[index]) for index in chosen[category]) / len(chosen[category]):.0f}",
            f"{by_way[PLAIN].tokens / len(chosen[category]):.0f}",
            *(f"{by_way[way].tokens_per_pass:.2f}" for way in drafters),
        ]
        for category, by_way in rows.items()
    ]
    head = ["category", "tokens in a prompt", "in an answer", *drafters]
    return [
        "Tokens per target pass by category:\n\n" + table(head, passes),
        "Tokens per second by category, over those of plain decoding:\n\n" + _ratios(rows, PLAIN, ways),
        "Tokens per second by category, over those of transformers generate:\n\n" + _ratios(rows, GENERATE, ways),
    ]


def _ratios(rows: Mapping[str, Mapping[str, Row]], baseline: str, ways: Sequence[str]) -> str:
    others = [way for way in ways if way != baseline]
    lines = [
        [
            category,
            f"{by_way[baseline].rate:.1f}",
            *(f"{by_way[way].rate / by_way[baseline].rate:.2f}" for way in others),
        ]
        for category, by_way in rows.items()
    ]
    return table(["category", f"{baseline}, tokens/s", *others], lines)


def in_flight_table(rows: Mapping[int, Mapping[str, Row]], prompts: int) -> str:
    """Table of `in_flight`; prompts: their number."""
    counts = list(rows)
    ways = list(dict.fromkeys(way for by_way in rows.values() for way in by_way))
    lines = []
    for way in ways:
        present = {count: rows[count].get(way) for count in counts}
        lines.append(
            [
                way,
                *("" if row is None else f"{row.rate:.1f}" for row in present.values()),
                *("" if row is None else f"{row.rate / rows[count][PLAIN].rate:.2f}" for count, row in present.items()),
                *(f"{row.tokens_per_pass:.2f}" if row is not None and row.stats else "" for row in present.values()),
                *("" if row is None else str(row.same) for row in present.values()),
            ]
        )
    titles = ("tokens/s", "over plain", "tokens/pass", "same tokens")
    head = ["", *(f"{title}, {count}" for title in titles for count in counts)]
    return (
        f"Sequences in flight, all {prompts} prompts: tokens per second, over plain decoding with as many in flight, "
        f"tokens per pass of a sequence, and prompts with the tokens of plain decoding one by one:\n\n"
        + table(head, lines)
    )


def metrics(
    label: str, rows: Mapping[str, Mapping[str, Row]], flights: Mapping[int, Mapping[str, Row]]
) -> dict[str, float]:
    """Report keys `LABEL.CATEGORY.WAY.…` and `LABEL.in_flight.N.WAY.…` with tokens_per_second and tokens_per_pass."""
    named = {
        **{f"{label}.{category}": by_way for category, by_way in rows.items()},
        **{f"{label}.in_flight.{count}": by_way for count, by_way in flights.items()},
    }
    values = {}
    for prefix, by_way in named.items():
        for way, row in by_way.items():
            values[f"{prefix}.{metric_name(way)}.tokens_per_second"] = row.rate
            if row.tokens_per_pass is not None:
                values[f"{prefix}.{metric_name(way)}.tokens_per_pass"] = row.tokens_per_pass
    return values
