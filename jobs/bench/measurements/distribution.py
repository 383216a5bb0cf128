"""Chi-square tests of `hasten bench lossless`: decoded sequences against the target's exact joint distribution."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.errors import UserError
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.jobs.bench.lossless import PROMPT, TOKENS, Config, Row
from hasten.jobs.bench.measurements import methods
from hasten.jobs.bench.measurements.markov import MarkovTarget, chi_square, joint
from hasten.jobs.cli.methods import method_names
from hasten.jobs.cli.options import nearest

_REQUESTS = 20_000  # sequences that are decoded by one call of the engine
_SAMPLINGS = {
    "temperature 1": Sampling(temperature=1.0),
    "temperature 0.8, top-p 0.9, penalty 1.2": Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2),
}


def pairs(config: Config) -> list[tuple[str, str]]:
    """Names of the verifiers and drafters to test together; UserError for one that does not exist.

    Unless asked for by name, verifiers that are not lossless are tested with one drafter only, as a control.
    """
    # A head on the target reads hidden states, which a table of logits does not have.
    drafters = [name for name in _chosen("drafter", config.drafters) if not methods.drafter(name).reads_target]
    if not drafters:
        raise UserError(f"drafters={config.drafters} is wrong: drafters with a head on the target cannot be tested")
    tested = []
    for verifier in _chosen("verifier", config.verifiers):
        control = not config.verifiers and not methods.verifier(verifier).lossless
        tested += [(verifier, drafter) for drafter in (drafters[:1] if control else drafters)]
    return tested


def _chosen(group: str, names: list[str]) -> list[str]:
    known = method_names(group)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f" (did you mean {near}?)" if near else ""
            raise UserError(f"{group}s={name} is wrong: expected any of {', '.join(known)}{hint}")
    return names or known


def measure(config: Config, tested: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """A row for every sampling of every pair of verifier and drafter."""
    samplings = list(_SAMPLINGS)[: None if config.filters else 1]
    names = [(verifier, drafter, sampling) for sampling in samplings for verifier, drafter in tested]
    if config.workers == 1:
        yield from (_row(config, row) for row in names)
        return
    # spawn: torch's threads do not survive a fork.
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(_row, config), names)


def _row(config: Config, names: tuple[str, str, str]) -> Row:
    """The test of a verifier, a drafter and a sampling."""
    torch.set_num_threads(config.threads)
    size = config.vocabulary
    generator = torch.Generator().manual_seed(config.seed)
    target, other = torch.randn(2, size, size, size, generator=generator)
    # The draft model agrees often enough that longer drafts are accepted, and differs in every row.
    draft = target + 0.7 * other
    prompt = torch.randint(size, (PROMPT,), generator=generator).tolist()
    with TemporaryDirectory() as folder:
        _save_head(Path(folder), config)
        models = Models(size, lambda: MarkovTarget(draft), Path(folder))
        return _tested(config, names, target, models, prompt)


def _save_head(folder: Path, config: Config) -> None:
    """Save an acceptance head beside the draft model: random, since it only has to end some of the chains."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = AcceptanceHead(config.vocabulary)
    with torch.no_grad():
        head.out.weight *= 10
    head.save(folder / FILE)


def _tested(config: Config, names: tuple[str, str, str], table: Tensor, models: Models, prompt: list[int]) -> Row:
    """The row of a verifier, a drafter and a sampling; table (V, V, V): logits of the target."""
    verifier, drafter, sampling = methods.verifier(names[0]), methods.drafter(names[1]), _SAMPLINGS[names[2]]
    probs = joint(table, prompt, sampling, TOKENS)
    started = perf_counter()
    try:
        # A chain longer than the tokens tested has no effect.
        policy = Fixed(min(TOKENS, config.draft_tokens) if drafter.chains() else config.draft_tokens)
        # One engine for all sequences keeps the drafter's memory: drafters that learn would propose nothing otherwise.
        engine = Engine(
            MarkovTarget(table), drafter, verifier, models=models, policy=policy, in_flight=config.in_flight
        )
        refusal = engine.refusal(sampling)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        return Row(*names, verifier.lossless, refusal)
    counts, tokens, passes = torch.zeros(probs.numel(), dtype=torch.long), 0, 0
    places = torch.tensor([config.vocabulary**power for power in reversed(range(TOKENS))])
    for start in range(0, config.samples, _REQUESTS):
        numbers = range(start, min(start + _REQUESTS, config.samples))
        results = list(engine.decode(_requests(config, numbers, prompt, sampling)))
        texts = torch.tensor([result.token_ids[:TOKENS] for result in results])
        counts += (texts * places).sum(-1).bincount(minlength=probs.numel())
        tokens += sum(result.stats.num_tokens for result in results)
        passes += sum(result.stats.num_spec_steps for result in results)
    statistic, freedom, p_value = chi_square(counts, probs.flatten())
    seconds = perf_counter() - started
    return Row(*names, verifier.lossless, None, statistic, freedom, p_value, tokens / passes, seconds)


def _requests(config: Config, numbers: range, prompt: list[int], sampling: Sampling) -> Iterator[Request]:
    for number in numbers:
        # One token more than is tested: the last one is never drafted, and drafts should reach depth TOKENS.
        yield Request(str(number), prompt, TOKENS + 1, sampling, config.seed * config.samples + number)
