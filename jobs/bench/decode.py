"""Speculative decoding against transformers: tokens per second, acceptance, sequences in flight, learning."""

import logging
from dataclasses import dataclass
from pathlib import Path
from time import process_time

from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "decode: speculative decoding against transformers"
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
        [], "JSON Lines files FILE:FIELD, a table each; [] takes prompts from the held-out standard library"
    )
    count: int = option(50, "prompts of each file, the first ones", at_least=1)
    prompt_tokens: int = option(384, "tokens of a prompt that are used, the last ones", at_least=2)
    max_new_tokens: int = option(64, "tokens to decode for every prompt", at_least=1)
    drafters: list[str] = option([], "drafters in the table; [] is all that the models allow")
    head: str | None = option(None, "acceptance head of specdec_pp; null is the one beside the draft model")
    max_draft_tokens: int = option(32, "largest tree", at_least=1)
    in_flight: int = option(8, "sequences at once in the second table", at_least=2)
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
    from hasten.jobs.bench.decoding import acceptance, speed
    from hasten.jobs.bench.decoding.setup import Setup

    setup = Setup(config)
    folder = start(config)
    with tracked(config, "bench decode", folder) as tracker:
        tracker.params(plain(config))
        parts = [provenance(), setup.costs_table()]
        metrics: dict[str, float] = {}
        for label, prompts in setup.prompts.items():
            rows, distinct = speed.compare(setup, prompts)
            parts.append(speed.speed_table(label, rows, len(prompts) - 1, config.max_new_tokens, distinct))
            parts += setup.omissions()
            _LOG.info("%s", parts[-1])
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
        metrics |= {"cpu_seconds": process_time(), "peak_rss_bytes": peak_rss_bytes()}
        publish(config.document, folder, HEADING, "\n\n".join(parts))
        tracker.metrics(metrics)
        report = {"job": "bench decode", "config": plain(config), "metrics": metrics, "output": str(folder)}
        return tracker.report(report)
