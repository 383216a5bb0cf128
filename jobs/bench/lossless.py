"""Verifiers and drafters on a target whose distribution is known: whether what comes out follows it, by chi-square."""

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import CONF, build, method_names
from hasten.jobs.cli.options import nearest
from hasten.jobs.common.schema import Run, option

LOG = logging.getLogger(__name__)
HEADING = "lossless: what is decoded follows the target"
# The joint distribution of this many tokens is tested.
TOKENS = 3
# Probability that any of all tests fails where every verifier is lossless.
LEVEL = 0.01
_PROMPT = 12
_LOT = 20_000  # samples that are asked for at once
_SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top-p 0.9, penalty 1.2": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
}


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
    """One test, or why there was none."""

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
    """Path of the report; the table is printed and put into the document."""
    from hasten.jobs.bench._markdown import default_document, replace_section
    from hasten.jobs.cli.compose import plain
    from hasten.jobs.common.run import start, tracked

    pairs = _pairs(config)
    folder = start(config)
    with tracked(config, "bench lossless", folder) as tracker:
        tracker.params(plain(config))
        rows = []
        for row in _measure(config, pairs):
            LOG.info("%s", _line(row))
            rows.append(row)
        text = _section(config, rows)
        replace_section(Path(config.document) if config.document else default_document(folder), HEADING, text)
        print(text, flush=True)
        report = {
            "job": "bench lossless",
            "config": plain(config),
            "metrics": _metrics(rows),
            "rows": [asdict(row) for row in rows],
            "output": str(folder),
        }
        return tracker.report(report)


def _pairs(config: Config) -> list[tuple[str, str]]:
    """Verifiers and drafters to be tested together."""
    drafters = _chosen("drafter", config.drafters)
    found = []
    for verifier in _chosen("verifier", config.verifiers):
        control = not config.verifiers and not _made("verifier", verifier).lossless
        found += [(verifier, drafter) for drafter in (drafters[:1] if control else drafters)]
    return found


def _chosen(group: str, names: list[str]) -> list[str]:
    known = method_names(group)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f" (did you mean {near}?)" if near else ""
            raise UserError(f"{group}s={name} is wrong: expected any of {', '.join(known)}{hint}")
    return names or known


def _made(group: str, name: str) -> Any:
    import yaml

    return build(yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")))


def _measure(config: Config, pairs: list[tuple[str, str]]) -> Iterator[Row]:
    samplings = list(_SAMPLINGS)[: None if config.filters else 1]
    names = [(verifier, drafter, sampling) for sampling in samplings for verifier, drafter in pairs]
    if config.workers == 1:
        yield from (_tested(config, each) for each in names)
        return
    # spawn: torch's threads do not survive a fork.
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(_tested, config), names)


def _tested(config: Config, names: tuple[str, str, str]) -> Row:
    """The test of one verifier, drafter and sampling."""
    import torch

    from hasten.accel.decoding.drafters.base import Models
    from hasten.accel.decoding.sampling import Sampling
    from hasten.jobs.bench._markov import MarkovTarget, joint

    torch.set_num_threads(config.threads)
    size = config.vocabulary
    generator = torch.Generator().manual_seed(config.seed)
    target, other = torch.randn(2, size, size, size, generator=generator)
    # The draft model is right often enough for drafts of some length to be accepted, and wrong in every row.
    draft = target + 0.7 * other
    prompt = torch.randint(size, (_PROMPT,), generator=generator).tolist()
    with TemporaryDirectory() as folder:
        _save_head(Path(folder), config)
        models = Models(size, lambda: MarkovTarget(draft), Path(folder))
        asked = Sampling(**_SAMPLINGS[names[2]])
        probs = joint(target, prompt, asked, TOKENS)
        return _row(config, names, asked, target, models, prompt, probs)


def _save_head(folder: Path, config: Config) -> None:
    """Put an acceptance head beside the draft model: one that ends chains here and there, which is all it has to do."""
    import torch

    from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = AcceptanceHead(config.vocabulary)
    with torch.no_grad():
        head.out.weight *= 10
    head.save(folder / FILE)


def _row(
    config: Config, names: tuple[str, str, str], sampling: Any, table: Any, models: Any, prompt: list[int], probs: Any
) -> Row:
    import torch

    from hasten.accel.decoding.engine import Engine
    from hasten.accel.decoding.lengths.sizing import Fixed
    from hasten.jobs.bench._markov import MarkovTarget, chi_square

    verifier, drafter = _made("verifier", names[0]), _made("drafter", names[1])
    started = perf_counter()
    try:
        # Of a chain more could not be used.
        policy = Fixed(min(TOKENS, config.draft_tokens) if drafter.chains() else config.draft_tokens)
        # The drafter's memory is kept from one sequence to the next, else those that learn would propose nothing.
        engine = Engine(
            MarkovTarget(table), drafter, verifier, models=models, policy=policy, in_flight=config.in_flight
        )
        refusal = engine.refusal(sampling)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        return Row(*names, verifier.lossless, refusal)
    counts, made, passes = torch.zeros(probs.numel(), dtype=torch.long), 0, 0
    places = torch.tensor([config.vocabulary**power for power in reversed(range(TOKENS))])
    for start in range(0, config.samples, _LOT):
        numbers = range(start, min(start + _LOT, config.samples))
        found = list(engine.decode(_requests(config, numbers, prompt, sampling)))
        texts = torch.tensor([result.token_ids[:TOKENS] for result in found])
        counts += (texts * places).sum(-1).bincount(minlength=probs.numel())
        made += sum(result.stats.num_tokens for result in found)
        passes += sum(result.stats.num_spec_steps for result in found)
    statistic, freedom, p_value = chi_square(counts, probs.flatten())
    seconds = perf_counter() - started
    return Row(*names, verifier.lossless, None, statistic, freedom, p_value, made / passes, seconds)


def _requests(config: Config, numbers: range, prompt: list[int], sampling: Any) -> Iterator[Any]:
    from hasten.accel.decoding.engine import Request

    for number in numbers:
        # One token more than is tested: the last one is never drafted, and drafts are to be three deep.
        yield Request(str(number), prompt, TOKENS + 1, sampling, config.seed * config.samples + number)


def _limit(rows: list[Row]) -> float:
    """p-value below which a row is biased: Bonferroni's, for as many tests as there are of lossless verifiers."""
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


def _metrics(rows: list[Row]) -> dict[str, Any]:
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


def _section(config: Config, rows: list[Row]) -> str:
    """The document's section, without its heading."""
    from hasten.jobs.bench._markdown import provenance, table

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
    # Once, and not for every sampling.
    refusals = {
        (row.verifier, row.drafter): [row.verifier, row.drafter, row.refusal] for row in rows if row.refusal is not None
    }
    text = [
        f"A second-order Markov chain over {config.vocabulary} tokens as target, another as draft model, both looked "
        f"up in tables; {config.samples} sequences a row after one prompt of {_PROMPT} tokens through the engine, "
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
