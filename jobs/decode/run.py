"""`hasten decode`: completions of prompts by speculative decoding, with the figures of what drafting gave."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter

import torch

from hasten.accel.decoding.engine import Request, Result
from hasten.accel.decoding.replay import distinct_share
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stats import Figures
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.verifier import Spec, sharing_refusal
from hasten.cluster.programs.decoding import Decoders
from hasten.cluster.programs.evaluation import check_weights
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.compose import plain
from hasten.jobs.cli.methods import build
from hasten.jobs.common.arithmetic import dtype_choices, gpus_per_worker, resolve_device
from hasten.jobs.common.cluster import joined
from hasten.jobs.common.plots import acceptance, time_shares
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import (
    Prompt,
    check_lengths,
    context_length,
    draft_folder,
    library_prompts,
    load_learned,
    model_folder,
    prompt_seed,
    read_prompts,
    save_learned,
    stop_ids,
)
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.tokenizer import Tokenizer, load_tokenizer, vocabulary_size
from hasten.jobs.decode.completions import Completions
from hasten.jobs.decode.options import DecodeConfig

_LOG = logging.getLogger(__name__)
# Prompts whose figures go to MLflow, a call each; the report has all of them.
_TRACKED_PROMPTS = 1000
# Of a prompt, in the report.
_PROMPT_FIGURES = ("num_tokens", "mean_acceptance_length", "draft_acceptance_rate", "tokens_per_second")


@dataclass(frozen=True)
class _Plan:
    """Everything that a run needs, checked. spec: a verifier's Spec. kept: results that are there, by id."""

    spec: Spec
    sampling: Sampling
    tokenizer: Tokenizer | None
    prompts: list[Prompt]
    completions: Completions
    kept: dict[str, Record]
    placement: str

    @property
    def missing(self) -> list[Prompt]:
        """Prompts without a result."""
        return [each for each in self.prompts if each.key not in self.kept]


def run(config: DecodeConfig) -> Path:
    """Decode what is missing; returns the path of report.json."""
    started = perf_counter()
    if config.stream:
        config.workers = config.in_flight = 1
    plan = _plan(config)
    with ExitStack() as stack:
        decoders = None
        if plan.missing:
            drafters = 0 if plan.placement == "private" else config.drafter_actors
            reads = {"target": plan.spec.target} | ({} if plan.spec.draft is None else {"draft": plan.spec.draft})
            stack.enter_context(joined(config, config.workers * config.threads + drafters, reads, {}))
            decoders = _decoders(config, plan)
            stack.callback(decoders.close)
            # Before the actors take the processors.
            check_weights([plan.spec.target], config.workers, config.threads)
            decoders.prepare()
        # Nothing was written so far: what is wrong in the input leaves nothing behind.
        run_dir = start(config)
        tracker = stack.enter_context(tracked(config, "decode", run_dir))
        tracker.params(plain(config))
        if plan.kept:
            _LOG.info("%s holds %d of %d results already", plan.completions.path, len(plan.kept), len(plan.prompts))
        metrics: Record = {"tokens_per_second": None, "target_efficiency": None}
        used = {"cpu_seconds": 0.0, "peak_rss_bytes": 0.0}
        records = dict(plan.kept)
        if decoders is not None:
            metrics |= _decode(config, plan, decoders, records)
            metrics |= _check_ties(config, plan, decoders, records)
            _save_learned(config, plan.spec.vocabulary, decoders)
            used = decoders.close()
        rows = [records[each.key] for each in plan.prompts]
        total = _total(rows)
        metrics = _metrics(total, rows) | metrics | {"prompts": len(rows), "prompts_kept": len(plan.kept)}
        metrics |= {
            "seconds": perf_counter() - started,
            "cpu_seconds": used["cpu_seconds"] + cpu_seconds(),
            "peak_rss_bytes": max(used["peak_rss_bytes"], peak_rss_bytes()),
        }
        report: Record = {
            "job": "decode",
            "config": plain(config),
            "metrics": metrics,
            "acceptance_histogram": total.acceptance_histogram,
            "acceptance_per_position": total.acceptance_per_position,
            "prompts": [_row(record) for record in rows],
            "output": str(plan.completions.path),
        }
        for step, row in enumerate(report["prompts"][:_TRACKED_PROMPTS]):
            tracker.metrics({"prompt": {key: row[key] for key in row if key != "id"}}, step)
        _figures(total, run_dir, tracker)
        path = tracker.report(report)
    _print_summary(metrics, plan.completions.path)
    return path


def _plan(config: DecodeConfig) -> _Plan:
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    drafter = build(config.drafter) if config.draft_tokens != 0 else None
    verifier = build(config.verifier)
    if drafter is not None:
        refusal = verifier.refusal(drafter.draws(sampling), drafter.chains(), sampling.is_greedy)
        if refusal is not None:
            raise UserError(refusal)
    target = model_folder("target", config.target)
    draft = None
    if drafter is not None:
        draft = draft_folder(config.draft, drafter, target, verifier.reads_draft_probs and not sampling.is_greedy)
    device = resolve_device(config.device)
    tokenizer, vocabulary = load_tokenizer(target), vocabulary_size(target)
    wrong = [token for token in config.stop if not 0 <= token < vocabulary]
    if wrong:
        raise UserError(f"stop={config.stop} holds {wrong[0]}, outside the target's vocabulary (0 to {vocabulary - 1})")
    if config.prompts is None:
        prompts = library_prompts(tokenizer, vocabulary)
    else:
        prompts = read_prompts(Path(config.prompts), tokenizer, vocabulary, config.prompt_field, config.id_field)
    check_lengths(prompts, config.max_new_tokens, context_length(target))
    dtype, *other_dtypes = dtype_choices(config.dtype, device)
    learned = None
    if config.memory and drafter is not None:
        learned = load_learned(Path(config.memory), config.drafter, vocabulary)
    spec = Spec(
        target=target,
        vocabulary=vocabulary,
        verifier=verifier,
        drafter=drafter,
        draft=draft,
        dtype=dtype,
        other_dtypes=tuple(other_dtypes),
        device=device,
        threads=config.threads,
        path=config.path,
        compiled=config.compiled,
        in_flight=config.in_flight,
        prefill_chunk=config.prefill_chunk,
        stop=tuple(sorted({*config.stop, *(() if config.ignore_eos else stop_ids(target, tokenizer))})),
        draft_tokens=config.draft_tokens,
        max_draft_tokens=config.max_draft_tokens,
        memory_bytes=config.memory_bytes,
        learned=learned,
    )
    output = Path(config.output) if config.output else Path(str(config.run_dir)) / "completions.jsonl"
    completions = Completions(output, _settings(config, spec, sampling), config.overwrite)
    kept = completions.kept()
    for each in prompts:
        if each.key in kept and kept[each.key].get("prompt_token_ids") != each.tokens:
            raise UserError(
                f"{each.where}: output={output} has a result of another prompt with the id {each.key!r}: "
                "give another output, or overwrite=true to start again"
            )
    wanted = {each.key for each in prompts}
    kept = {key: record for key, record in kept.items() if key in wanted}
    return _Plan(spec, sampling, tokenizer, prompts, completions, kept, _placement(config, spec, sampling))


def _placement(config: DecodeConfig, spec: Spec, sampling: Sampling) -> str:
    """Where drafters are, as far as it is known before anything is measured."""
    refusal = sharing_refusal(spec, sampling)
    if refusal is not None and config.placement == "shared":
        raise UserError(refusal)
    alone = spec.drafter is None or (config.placement == "auto" and config.workers == 1)
    return "private" if alone or refusal is not None else config.placement


def _settings(config: DecodeConfig, spec: Spec, sampling: Sampling) -> Record:
    """What decides a result, apart from its prompt."""
    return {
        "target": Checkpoint(spec.target).fingerprint()[:16],
        "draft": None if spec.draft is None else Checkpoint(spec.draft).fingerprint()[:16],
        "drafter": None if spec.drafter is None else config.drafter,
        "verifier": config.verifier,
        **vars(sampling),
        "max_new_tokens": config.max_new_tokens,
        "stop": list(spec.stop),
        "draft_tokens": config.draft_tokens,
        "max_draft_tokens": config.max_draft_tokens,
        # What is measured anew in every run is no setting.
        "dtype": "auto" if spec.other_dtypes else str(spec.dtype).removeprefix("torch."),
        "path": config.path,
        "seed": config.seed,
    }


def _decoders(config: DecodeConfig, plan: _Plan) -> Decoders:
    on_tokens = _Printer(plan.tokenizer).tokens if config.stream else None
    gpus = gpus_per_worker(config.device)
    return Decoders(plan.spec, config.workers, config.drafter_actors, gpus, plan.placement, on_tokens)


def _decode(
    config: DecodeConfig, plan: _Plan, decoders: Decoders, records: dict[str, Record]
) -> dict[str, float | None]:
    """Figures that only a run has; the results are written, and put among records."""
    prompts = {each.key: each for each in plan.missing}
    requests = [
        Request(key, each.tokens, config.max_new_tokens, plan.sampling, prompt_seed(config.seed, key))
        for key, each in prompts.items()
    ]
    tokens = drafted = steps = 0
    started = perf_counter()
    with plan.completions as completions, Progress("decode", len(plan.prompts), "prompt") as progress:
        progress.begin(len(plan.kept))
        for result in decoders(requests):
            record = _record(prompts[result.id], result, plan.tokenizer)
            completions.write(record)
            records[result.id] = record
            tokens += len(result.token_ids)
            drafted += result.figures.num_draft_tokens
            steps += result.figures.num_spec_steps
            if not config.stream:
                progress.update(len(records), f"{tokens / (perf_counter() - started):.0f} tokens/s")
    seconds = perf_counter() - started
    if config.stream:
        print()  # behind the last completion
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
    config: DecodeConfig, plan: _Plan, decoders: Decoders, records: Mapping[str, Record]
) -> dict[str, float]:
    """What a reduced type changed of greedy completions; nothing where it can have changed none."""
    chosen = [records[each.key] for each in plan.missing[: config.check_prompts]]
    if decoders.dtype == torch.float32 or not plan.sampling.is_greedy or plan.sampling.has_penalty or not chosen:
        return {}
    found = decoders.ties([(record["prompt_token_ids"], record["token_ids"]) for record in chosen])
    if found is None:
        return {}
    if found.faults:
        _LOG.warning(
            "%d of %d tokens are not the target's by float32 logits and no ties to rounding (gap up to %.3f)",
            found.faults,
            found.tokens,
            found.largest_gap,
        )
    return {
        "ties_checked_tokens": found.tokens,
        "ties": found.ties,
        "ties_faults": found.faults,
        "ties_largest_gap": found.largest_gap,
    }


def _record(prompt: Prompt, result: Result, tokenizer: Tokenizer | None) -> Record:
    """A line of the output. completion: None where there is no tokenizer."""
    figures = result.figures
    counts = {key: value for key, value in vars(figures).items() if key != "histogram"}
    text = None if tokenizer is None else tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return {
        "id": prompt.id,
        "completion": text,
        "token_ids": result.token_ids,
        "prompt_token_ids": prompt.tokens,
        "ended": result.ended,
        "figures": counts
        | figures.metrics()
        | {
            "acceptance_histogram": figures.acceptance_histogram,
            "acceptance_per_position": figures.acceptance_per_position,
        },
    }


def _total(records: Sequence[Record]) -> Figures:
    """Figures of all results added up, those of earlier runs among them."""

    def restored() -> Iterator[Figures]:
        for record in records:
            told = record["figures"]
            counts = {each.name: told[each.name] for each in fields(Figures) if each.name in told}
            yield Figures(**counts, histogram=dict(enumerate(told["acceptance_histogram"])))

    return Figures.total(restored())


def _metrics(total: Figures, records: Sequence[Record]) -> Record:
    return total.metrics() | {"distinct_share": distinct_share([record["token_ids"] for record in records])}


def _row(record: Record) -> Record:
    figures = record["figures"]
    return {
        "id": record["id"],
        **{name: figures[name] for name in _PROMPT_FIGURES},
        "distinct_share": distinct_share([record["token_ids"]]),
    }


def _save_learned(config: DecodeConfig, vocabulary: int, decoders: Decoders) -> None:
    if config.memory is None:
        return
    learned = decoders.learned()
    if learned:
        save_learned(Path(config.memory), config.drafter, vocabulary, learned)
    else:
        _LOG.warning("memory=%s is not written, as this drafter learns nothing", config.memory)


def _figures(total: Figures, run_dir: Path, tracker: Tracker) -> None:
    if total.acceptance_histogram:
        tracker.figure(acceptance(total.acceptance_histogram, run_dir / "acceptance.png"))
    seconds = {
        "prefill": total.prefill_seconds,
        "draft": total.draft_seconds,
        "target": total.target_seconds,
        "verify": total.verify_seconds,
    }
    tracker.figure(time_shares(seconds, run_dir / "time.png"))


class _Printer:
    """Prints completions as they come, each under its prompt's id."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._id: str | None = None
        self._ids: list[int] = []
        self._shown = ""

    def tokens(self, key: str, new: Sequence[int]) -> None:
        """Print what is new of a completion; bytes that are no whole character yet wait."""
        if key != self._id:
            print(f"{'' if self._id is None else chr(10)}--- {key}")
            self._id, self._ids, self._shown = key, [], ""
        self._ids += new
        if self._tokenizer is None:
            text = " ".join(map(str, self._ids)) + " "
        else:
            text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).rstrip("\ufffd")
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text


def _print_summary(metrics: Record, output: Path) -> None:
    print(f"completions: {as_given(output)}")
    speed = "" if metrics["tokens_per_second"] is None else f"; {metrics['tokens_per_second']:.1f} tokens a second"
    print(f"decoded: {metrics['num_tokens']} tokens for {metrics['prompts']} prompts{speed}")
    print(
        f"acceptance: {metrics['mean_acceptance_length']:.2f} tokens a pass, "
        f"{metrics['draft_acceptance_rate']:.1%} of what was drafted; distinct tokens {metrics['distinct_share']:.1%}"
    )
