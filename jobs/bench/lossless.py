"""Verifiers and drafters on a target of known distribution: chi-square tests of the decoded tokens against it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "lossless: what is decoded follows the target"
# The joint distribution of this many tokens is tested, after a prompt of PROMPT tokens.
TOKENS, PROMPT = 3, 12
# Probability that any of all tests fails if every verifier is lossless.
LEVEL = 0.01


@dataclass
class Config(Run):
    """Decode the same prompt many times, and test the joint distribution of the first three tokens."""

    samples: int = option(200_000, "sequences that are decoded for each row", at_least=100)
    verifiers: list[str] = option([], "which verifiers; [] is all, those that are not lossless with one drafter only")
    drafters: list[str] = option([], "which drafters; [] is all")
    vocabulary: int = option(4, "tokens of the target", at_least=2, at_most=8)
    draft_tokens: int = option(8, "nodes of a draft at most", at_least=1)
    in_flight: int = option(64, "sequences that are decoded at once", at_least=1)
    filters: bool = option(True, "test at a lower temperature with top-p and a repetition penalty, too")
    workers: int = option(1, "processes that share the rows", at_least=1)
    threads: int = option(1, "threads of a process", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


@dataclass(frozen=True)
class Row:
    """The test of a verifier with a drafter; refusal: why they cannot be combined, None if they were tested."""

    verifier: str
    drafter: str
    sampling: str
    lossless: bool
    refusal: str | None = None
    statistic: float = 0.0
    freedom: int = 0
    p_value: float = 1.0
    tokens_per_pass: float = 1.0
    seconds: float = 0.0


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench lossless --help` must not wait for it.
    from hasten.jobs.bench.measurements.distribution import measure, pairs

    tested = pairs(config)
    folder = start(config)
    with tracked(config, "bench lossless", folder) as tracker:
        tracker.params(plain(config))
        rows = []
        for row in measure(config, tested):
            _LOG.info("%s", _line(row))
            rows.append(row)
        publish(config.document, folder, HEADING, _section(config, rows))
        report = {
            "job": "bench lossless",
            "config": plain(config),
            "metrics": _metrics(rows),
            "rows": [asdict(row) for row in rows],
            "output": str(folder),
        }
        return tracker.report(report)


def _limit(rows: Sequence[Row]) -> float:
    """p-value below which a row is biased: Bonferroni-corrected for the number of tests of lossless verifiers."""
    return LEVEL / max(1, sum(row.refusal is None and row.lossless for row in rows))


def _verdict(row: Row, limit: float) -> str:
    if row.refusal is not None:
        return "refused"
    biased = row.p_value < limit
    if not row.lossless:
        return "biased, as it says" if biased else "not lossless, not seen"
    return "BIASED" if biased else "follows"


def _line(row: Row) -> str:
    names = f"{row.verifier} × {row.drafter}, {row.sampling}"
    if row.refusal is not None:
        return f"{names}: refused: {row.refusal}"
    return (
        f"{names}: χ² {row.statistic:.1f} at {row.freedom} degrees, p {row.p_value:.4f}, "
        f"{row.tokens_per_pass:.2f} tokens a pass, {row.seconds:.0f} s"
    )


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    limit = _limit(rows)
    tested = [row for row in rows if row.refusal is None and row.lossless]
    return {
        "tests": len(tested),
        "refused": sum(row.refusal is not None for row in rows),
        "biased": sum(row.p_value < limit for row in tested),
        "p_value_limit": limit,
        "least_p_value": min((row.p_value for row in tested), default=1.0),
        "seconds": sum(row.seconds for row in rows),
    }


def _section(config: Config, rows: Sequence[Row]) -> str:
    """The document's section, without its heading."""
    metrics, limit = _metrics(rows), _limit(rows)
    head = ["verifier", "drafter", "sampling", "tokens per pass", "χ²", "degrees", "p-value", "verdict"]
    cells = [
        [
            row.verifier,
            row.drafter,
            row.sampling,
            f"{row.tokens_per_pass:.2f}",
            f"{row.statistic:.1f}",
            str(row.freedom),
            f"{row.p_value:.2g}",
            _verdict(row, limit),
        ]
        for row in rows
        if row.refusal is None
    ]
    # Once per pair, although each sampling has a row.
    refusals = {
        (row.verifier, row.drafter): [row.verifier, row.drafter, row.refusal] for row in rows if row.refusal is not None
    }
    text = [
        f"A second-order Markov chain over {config.vocabulary} tokens as target, another as draft model, both looked "
        f"up in tables; {config.samples} sequences a row after one prompt of {PROMPT} tokens through the engine, "
        f"{config.in_flight} at once, at most {config.draft_tokens} drafted tokens; seed {config.seed}. χ² is of the "
        f"joint distribution of the first {TOKENS} tokens against the exact one.",
        provenance(),
        f"{metrics['tests']} tests of lossless verifiers, {metrics['biased']} of them biased: a row is where p is "
        f"below {limit:.2g}, which with all of them right happens to any with probability {LEVEL:g} (Bonferroni). The "
        f"least p is {metrics['least_p_value']:.2g}.",
        table(head, cells),
    ]
    if refusals:
        text += ["Pairs that are refused:", table(["verifier", "drafter", "because"], list(refusals.values()))]
    return "\n\n".join(text)
