"""`hasten replay`: measures a drafter's acceptance on a text or on recorded completions, without a target."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from hasten.accel.data.tokens import load_tokens
from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.replay import distinct_share, replay
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.jobs.cli.methods import build
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.markdown import table
from hasten.jobs.common.plots import acceptance
from hasten.jobs.common.prompts import draft_folder, load_learned, model_folder, read_recorded
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import load_tokenizer, vocabulary_size
from hasten.jobs.replay.options import ReplayConfig


def run(config: ReplayConfig) -> Path:
    """Replay the text at every budget; returns the path of report.json."""
    started = perf_counter()
    torch.set_num_threads(config.threads)
    sequences, replayed = _prepared(config)
    # Nothing was written so far: a mistake in the input leaves no files behind.
    run_dir = start(config)
    with tracked(config, "replay", run_dir) as tracker:
        tracker.params(plain(config))
        replayed_tokens = [tokens[prompt_length:] for tokens, prompt_length in sequences]
        rows = []
        for budget in config.budgets:
            total = replayed(budget)
            steps = total.num_spec_steps
            rows.append(
                {
                    "budget": budget,
                    "tokens_per_step": total.num_tokens / steps,
                    "drafted_per_step": total.num_draft_tokens / steps,
                    "draft_acceptance_rate": total.metrics()["draft_acceptance_rate"],
                    "draft_microseconds_per_step": 1e6 * total.draft_seconds / steps,
                    "num_spec_steps": steps,
                    "acceptance_histogram": total.acceptance_histogram,
                    "acceptance_per_position": total.acceptance_per_position,
                }
            )
            tracker.metrics({"replay": rows[-1]}, step=budget)
            tracker.figure(acceptance(total.acceptance_histogram, run_dir / f"acceptance_{budget}.png"))
        metrics = {
            **{key: value for key, value in rows[0].items() if not isinstance(value, list)},
            "sequences": len(sequences),
            "num_tokens": sum(map(len, replayed_tokens)),
            "distinct_share": distinct_share(replayed_tokens),
            "distinct_trigram_share": distinct_share(replayed_tokens, 3),
            "seconds": perf_counter() - started,
            "cpu_seconds": cpu_seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        path = tracker.report(
            {
                "job": "replay",
                "config": plain(config),
                "metrics": metrics,
                "budgets": rows,
                "output": str(run_dir),
            }
        )
    keys = ("tokens_per_step", "drafted_per_step", "draft_acceptance_rate", "draft_microseconds_per_step")
    cells = [[str(row["budget"]), *(f"{row[key]:.3g}" for key in keys)] for row in rows]
    print(table(["budget", "tokens a step", "drafted a step", "accepted of drafted", "µs of drafting a step"], cells))
    print(
        f"text: {metrics['num_tokens']} tokens in {len(sequences)} sequences, {metrics['distinct_share']:.1%} of the "
        f"tokens and {metrics['distinct_trigram_share']:.1%} of the trigrams distinct"
    )
    return path


def _prepared(config: ReplayConfig) -> tuple[list[tuple[list[int], int]], Callable[[int], DecodingStats]]:
    """The sequences with their prompt lengths, and a function from a budget to the statistics over all sequences."""
    drafter: Drafter = build(config.drafter)
    if not config.budgets or min(config.budgets) < 1 or len(set(config.budgets)) < len(config.budgets):
        raise UserError(f"budgets={config.budgets} is wrong: expected different whole numbers, 1 or more")
    target = model_folder("target", config.target)
    vocabulary = vocabulary_size(target)
    device = resolve_device(config.device)
    draft = draft_folder(config.draft, drafter, target, reads_draft_probs=False)
    load = None
    if draft is not None:
        dtype = resolve_dtype(config.dtype, device)
        load = partial(load_target, draft, dtype, device, config.path, drafter.needs_hidden)
    models = Models(vocabulary, load, draft)
    learned = load_learned(Path(config.memory), config.drafter, vocabulary) if config.memory else {}
    sequences = _sequences(config, target, vocabulary)

    def replayed(budget: int) -> DecodingStats:
        # Every budget starts with a new memory: tokens learned at one budget would favour the next.
        memory = drafter.new_memory(models)
        if learned:
            drafter.load(memory, learned)
        return DecodingStats.total(replay(drafter, memory, sequences, budget))

    return sequences, replayed


def _sequences(config: ReplayConfig, target: Path, vocabulary: int) -> list[tuple[list[int], int]]:
    if config.recorded is not None:
        recorded = read_recorded(Path(config.recorded), vocabulary)
        sequences = [(tokens, prompt_length) for tokens, prompt_length in recorded if len(tokens) > prompt_length]
        if not sequences:
            raise UserError(f"recorded={config.recorded} holds no completion of one token or more")
        return sequences
    if config.prompt_length >= config.sequence_length:
        raise UserError(
            f"prompt_length={config.prompt_length} must be below sequence_length={config.sequence_length}: "
            "the tokens after the prompt are replayed"
        )
    tokens = load_tokens(
        config.text,
        load_tokenizer(target, config.template),
        config.sequences,
        config.sequence_length,
        split="held_out",
        seed=config.seed,
        vocabulary=vocabulary,
    )
    return [(row, config.prompt_length) for row in tokens.tolist()]
