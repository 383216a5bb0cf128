"""Speculative decoding against transformers: tokens per second, acceptance, sequences in flight, learning."""

import logging
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, TEMPLATE, Run, option, plain

if TYPE_CHECKING:
    from hasten.jobs.bench.decoding.setup import Setup

_LOG = logging.getLogger(__name__)
HEADING = "decode: speculative decoding against transformers"
CHAT_HEADING = "decode, chat: speculative decoding of chat prompts"
_DRAFT = "embedded:draft"


@dataclass
class Config(Run):
    """Decode the same prompts in every way, one after the other in one process, by CPU time."""

    target: str = option("embedded:target", f"the target: {MODEL}")
    draft: str | None = option(
        _DRAFT,
        f"the draft model: {MODEL}; without one (null), and if the target has another tokenizer than the default, "
        "drafters that need one are left out",
    )
    prompts: list[str] = option(
        [],
        "JSON Lines files of texts, FILE:FIELD, a table each; [] takes prompts from the held-out standard library. "
        "FILE alone holds chat prompts (`messages`, and a `category`); chat is hasten's own file of them: tables by "
        "category, in a section of their own",
    )
    count: int = option(50, "prompts of each file of texts, the first ones", at_least=1)
    per_category: int = option(3, "chat prompts of each category, the first ones; hasten's own have 25", at_least=1)
    template: str | None = option(None, TEMPLATE, path="in")
    prompt_tokens: int = option(384, "tokens of a text that are used, the last ones", at_least=2)
    max_new_tokens: int = option(
        64, "tokens to decode for every prompt; an answer in a chat may end before", at_least=1
    )
    drafters: list[str] = option([], "drafters in the table; [] is all that the models allow")
    head: str | None = option(None, "acceptance head of specdec_pp; null is the one beside the draft model")
    max_draft_tokens: int = option(32, "largest tree", at_least=1)
    in_flight: int = option(8, "sequences at once in the second table", at_least=2)
    chat_in_flight: list[int] = option([1, 4, 16], "sequences at once in the table of chat prompts, each a column")
    dtype: str = option("float32", "dtype of both models", choices=DTYPES)
    device: str = option("auto", "where to compute; auto is cuda where there is one", choices=DEVICES)
    compiled: bool = option(False, "compile the fast path; takes a while for every size of a tree")
    sampled: bool = option(True, "compare sampled drafters, too")
    shared: bool = option(True, "compare a drafter that two workers share with one in each")
    threads: int = option(1, "threads", at_least=1)
    document: str | None = option(None, "Markdown file for the tables; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the tables are printed and written to the document."""
    # torch and transformers: `hasten bench decode --help` must not wait for them.
    from hasten.jobs.bench.decoding.setup import Setup

    setup = Setup(config)
    folder = start(config)
    with tracked(config, "bench decode", folder) as tracker:
        tracker.params(plain(config))
        metrics: dict[str, float] = {}
        if setup.prompts:
            metrics |= _texts(config, setup, folder)
        if setup.chat:
            metrics |= _chats(config, setup, folder)
        metrics |= {"cpu_seconds": process_time(), "peak_rss_bytes": peak_rss_bytes()}
        tracker.metrics(metrics)
        report = {"job": "bench decode", "config": plain(config), "metrics": metrics, "output": str(folder)}
        return tracker.report(report)


def _texts(config: Config, setup: "Setup", folder: Path) -> dict[str, float]:
    """Metrics of the prompts that are plain texts; the tables are published."""
    from hasten.jobs.bench.decoding import acceptance, speed

    parts = [provenance(), setup.costs_table()]
    metrics: dict[str, float] = {}
    for label, prompts in setup.prompts.items():
        rows, distinct = speed.compare(setup, prompts)
        new = f"{config.max_new_tokens} greedy tokens each"
        parts.append(speed.speed_table(label, rows, len(prompts) - 1, new, distinct))
        _LOG.info("%s", parts[-1])
        parts += setup.omissions()
        metrics |= speed.speed_metrics(label, rows)
    first = next(iter(setup.prompts.values()))[1:]
    rates = speed.in_flight(setup, first)
    parts.append(speed.in_flight_table(rates, config.in_flight))
    metrics |= {f"in_flight.{name}": many / one for name, (one, many) in rates.items()}
    learned = acceptance.learning(setup, first)
    parts.append(acceptance.learning_table(learned))
    metrics |= {f"learning.{name}": quarters[-1] / quarters[0] for name, quarters in learned.items()}
    if config.sampled and setup.assistant is not None:
        sampled = acceptance.sampled(setup, first)
        parts.append(acceptance.sampled_table(sampled))
        metrics |= {f"sampled.{name}": length for name, (length, _) in sampled.items()}
    if config.shared:
        shared = acceptance.shared(config, folder, first)
        parts.append(acceptance.shared_table(shared))
        metrics |= {f"shared.{name}": length for name, (length, _) in shared.items()}
    publish(config.document, folder, HEADING, "\n\n".join(parts))
    return metrics


def _chats(config: Config, setup: "Setup", folder: Path) -> dict[str, float]:
    """Metrics of chat prompts; the tables are published."""
    from hasten.jobs.bench.decoding import chat, speed

    parts = [provenance(), setup.costs_table()]
    metrics: dict[str, float] = {}
    for label, prompts in setup.chat.items():
        samples = speed.measure(setup, [prompts.warm_up, *prompts.tokens], setup.stop)
        rows = chat.by_category(samples, prompts)
        flights = chat.in_flight(setup, prompts, samples)
        new = f"up to {config.max_new_tokens} greedy tokens each, to the end of the turn"
        ways = list(rows[chat.ALL].values())
        parts.append(speed.speed_table(label, ways, len(prompts.tokens), new, speed.distinct(samples)))
        parts += setup.omissions()
        parts += chat.category_tables(rows, prompts)
        parts.append(chat.in_flight_table(flights, len(prompts.tokens)))
        metrics |= speed.speed_metrics(label, ways) | chat.metrics(label, rows, flights)
    publish(config.document, folder, CHAT_HEADING, "\n\n".join(parts))
    return metrics
