"""`hasten decode`: completes prompts by speculative decoding and reports acceptance and speed."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hasten.accel.cache.full import Full
from hasten.accel.decoding.engine import Request, Result
from hasten.accel.decoding.replay import distinct_share
from hasten.accel.decoding.stats import DecodingStats
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.evaluation import check_weights
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.cluster import cluster_session, worker_resources
from hasten.jobs.common.plots import acceptance, time_shares
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import Prompt, prompt_seed, save_learned
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.decode.completions import Record
from hasten.jobs.decode.inputs import Inputs, cache_draft, prepare
from hasten.jobs.decode.options import DecodeConfig
from hasten.jobs.decode.stopping import Stopping
from hasten.jobs.decode.streaming import Printer
from hasten.jobs.decode.verification import explained, loss_notice, rule_names

_LOG = logging.getLogger(__name__)
# At most this many prompts are logged to MLflow, one call each; the report has all of them.
_TRACKED_PROMPTS = 1000
# Statistics in a prompt's row of the report.
_PROMPT_STATS = ("num_tokens", "mean_acceptance_length", "draft_acceptance_rate", "tokens_per_second")


def run(config: DecodeConfig) -> Path:
    """Decode the prompts without a result; returns the path of report.json."""
    started = perf_counter()
    if config.stream:
        config.workers = config.in_flight = 1
    inputs = prepare(config)
    printer = Printer(inputs.stopping) if config.stream else None
    with ExitStack() as stack:
        decoders = None
        if inputs.missing:
            drafters = 0 if inputs.placement == "private" else config.drafter_actors
            drafts = {"draft": inputs.spec.draft, "cache.draft": cache_draft(inputs.spec)}
            reads = {"target": inputs.spec.target} | {name: path for name, path in drafts.items() if path is not None}
            cpus = config.workers * config.threads * config.target_group.size + drafters
            stack.enter_context(cluster_session(config, cpus, reads, {}, group=config.target_group))
            decoders = _decoders(config, inputs, printer)
            stack.callback(decoders.close)
            # Checked before the actors occupy the CPUs.
            check_weights([inputs.spec.target], config.workers, config.threads)
            decoders.prepare()
        # Nothing was written so far: a mistake in the input leaves no files behind.
        run_dir = start(config)
        tracker = stack.enter_context(tracked(config, "decode", run_dir))
        tracker.params(plain(config))
        output, kept = inputs.completions.path, inputs.kept
        verification = config, inputs.spec.verifier, inputs.spec.drafter, inputs.sampling
        explanation = explained(*verification)
        notice = loss_notice(*verification[1:])
        if explanation:
            _LOG.info("%s", explanation)
        if kept:
            _LOG.info("%s holds %d of %d results already", output, len(kept), len(inputs.prompts))
        metrics: dict[str, float | None] = {"tokens_per_second": None, "target_efficiency": None}
        used = {"cpu_seconds": 0.0, "peak_rss_bytes": 0.0}
        records = dict(kept)
        if decoders is not None:
            metrics |= _decode(config, inputs, decoders, records, printer)
            metrics |= _check_ties(config, inputs, decoders, records)
            _save_learned(config, inputs.spec.vocabulary, decoders)
            used = decoders.close()
        rows = [records[prompt.key] for prompt in inputs.prompts]
        total = _total(rows)
        metrics = _metrics(total, rows) | metrics | {"prompts": len(rows), "prompts_kept": len(kept)}
        metrics |= {
            "seconds": perf_counter() - started,
            "cpu_seconds": used["cpu_seconds"] + cpu_seconds(),
            "peak_rss_bytes": max(used["peak_rss_bytes"], peak_rss_bytes()),
        }
        prompts = [_row(record) for record in rows]
        report = {
            "job": "decode",
            "config": plain(config),
            "metrics": metrics,
            "verifier": rule_names(*verification),
            "lossless": notice is None,
            "acceptance_histogram": total.acceptance_histogram,
            "acceptance_per_position": total.acceptance_per_position,
            "prompts": prompts,
            **inputs.stopping.report(inputs.prompts),
            "output": str(output),
        }
        for step, row in enumerate(prompts[:_TRACKED_PROMPTS]):
            tracker.metrics({"prompt": {key: row[key] for key in row if key != "id"}}, step)
        _plots(total, run_dir, tracker)
        path: Path = tracker.report(report)
    _print_summary(metrics, output)
    if notice is not None:
        print(notice)
    return path


def _decoders(config: DecodeConfig, inputs: Inputs, printer: Printer | None) -> Decoders:
    on_tokens = printer.tokens if printer is not None else None
    needs = worker_resources(config)
    with_model = inputs.spec.drafter is not None and inputs.spec.drafter.needs_draft_model
    drafter_needs = ActorResources(1, needs.gpus if with_model else 0)
    return Decoders(
        inputs.spec, config.workers, config.drafter_actors, needs, drafter_needs, inputs.placement, on_tokens
    )


def _decode(
    config: DecodeConfig,
    inputs: Inputs,
    decoders: Decoders,
    records: dict[str, Record],
    printer: Printer | None,
) -> dict[str, float | None]:
    """Decode the missing prompts, write the results and add them to records; returns the metrics of this run."""
    prompts = {prompt.key: prompt for prompt in inputs.missing}
    requests = [
        Request(
            key,
            prompt.tokens,
            config.max_new_tokens,
            inputs.sampling,
            prompt_seed(config.seed, key),
            inputs.stopping.ids(prompt),
            prompt.contexts,
        )
        for key, prompt in prompts.items()
    ]
    tokens = drafted = steps = 0
    started = perf_counter()
    with inputs.completions as completions, Progress("decode", len(inputs.prompts), "prompt") as progress:
        progress.begin(len(inputs.kept))
        for result in decoders(requests):
            record = _record(prompts[result.id], result, inputs.stopping)
            completions.write(record)
            records[result.id] = record
            tokens += len(result.token_ids)
            drafted += result.stats.num_draft_tokens
            steps += result.stats.num_spec_steps
            if printer is None:
                progress.update(len(records), f"{tokens / (perf_counter() - started):.0f} tokens/s")
    seconds = perf_counter() - started
    if printer is not None:
        printer.end()
        print()  # end the line of the last completion
    if decoders.restarts:
        _LOG.warning("%d actor(s) were lost and replaced", decoders.restarts)
    nodes = round(drafted / steps) if steps else 0
    return {
        "decode_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "target_efficiency": decoders.target_efficiency(nodes) if nodes else None,
        "restarts": decoders.restarts,
        "shared_drafters": config.drafter_actors if decoders.shared else 0,
    }


def _check_ties(
    config: DecodeConfig, inputs: Inputs, decoders: Decoders, records: Mapping[str, Record]
) -> dict[str, float]:
    """Metrics of ties that a reduced dtype broke in greedy completions; empty if none are possible."""
    chosen = [records[prompt.key] for prompt in inputs.missing[: config.check_prompts]]
    sampling = inputs.sampling
    if decoders.dtype == torch.float32 or not sampling.is_greedy or sampling.has_penalty or not chosen:
        return {}
    if not isinstance(inputs.spec.cache, Full | None):
        return {}  # the check reads the whole prompt, as the cache does not
    ties = decoders.ties([(record["prompt_token_ids"], record["token_ids"]) for record in chosen])
    if ties is None:
        return {}
    if ties.faults:
        _LOG.warning(
            "%d of %d tokens differ from the target's by float32 logits by more than rounding (gap up to %.3f)",
            ties.faults,
            ties.tokens,
            ties.largest_gap,
        )
    return {
        "ties_checked_tokens": ties.tokens,
        "ties": ties.ties,
        "ties_faults": ties.faults,
        "ties_largest_gap": ties.largest_gap,
    }


def _record(prompt: Prompt, result: Result, stopping: Stopping) -> Record:
    """A line of the output."""
    stats = result.stats
    counts = {key: value for key, value in vars(stats).items() if key != "histogram"}
    return {
        "id": prompt.id,
        "completion": stopping.text(result.token_ids),
        "token_ids": result.token_ids,
        "prompt_token_ids": prompt.tokens,
        "ended": result.ended,
        "stopped_by": stopping.stopped_by(result.ended, result.token_ids, result.stop_string),
        "figures": counts
        | stats.metrics()
        | {
            "acceptance_histogram": stats.acceptance_histogram,
            "acceptance_per_position": stats.acceptance_per_position,
        },
    }


def _total(records: Sequence[Record]) -> DecodingStats:
    """Sum of the statistics of all results, including those of earlier runs."""

    def restored() -> Iterator[DecodingStats]:
        for record in records:
            written = record["figures"]
            counts = {field.name: written[field.name] for field in fields(DecodingStats) if field.name in written}
            yield DecodingStats(**counts, histogram=dict(enumerate(written["acceptance_histogram"])))

    return DecodingStats.total(restored())


def _metrics(total: DecodingStats, records: Sequence[Record]) -> dict[str, float | None]:
    return {**total.metrics(), "distinct_share": distinct_share([record["token_ids"] for record in records])}


def _row(record: Record) -> dict[str, Any]:
    """A prompt's row in the report."""
    stats = record["figures"]
    return {
        "id": record["id"],
        **{name: stats[name] for name in _PROMPT_STATS},
        "distinct_share": distinct_share([record["token_ids"]]),
    }


def _save_learned(config: DecodeConfig, vocabulary: int, decoders: Decoders) -> None:
    if config.memory is None:
        return
    learned = decoders.learned()
    if learned:
        save_learned(Path(config.memory), config.drafter, vocabulary, learned)
    else:
        _LOG.warning("memory=%s is not written: this drafter has no learned state", config.memory)


def _plots(total: DecodingStats, run_dir: Path, tracker: Tracker) -> None:
    if total.acceptance_histogram:
        tracker.figure(acceptance(total.acceptance_histogram, run_dir / "acceptance.png"))
    seconds = {
        "prefill": total.prefill_seconds,
        "draft": total.draft_seconds,
        "target": total.target_seconds,
        "verify": total.verify_seconds,
    }
    tracker.figure(time_shares(seconds, run_dir / "time.png"))


def _print_summary(metrics: Mapping[str, float | None], output: Path) -> None:
    print(f"completions: {as_given(output)}")
    speed = "" if metrics["tokens_per_second"] is None else f"; {metrics['tokens_per_second']:.1f} tokens a second"
    print(f"decoded: {metrics['num_tokens']} tokens for {metrics['prompts']} prompts{speed}")
    drafts = f"{metrics['draft_acceptance_rate']:.1%} of what was drafted"
    if not metrics["num_draft_tokens"]:
        drafts = "nothing was drafted"
    print(
        f"acceptance: {metrics['mean_acceptance_length']:.2f} tokens a pass, {drafts}; "
        f"distinct tokens {metrics['distinct_share']:.1%}"
    )
