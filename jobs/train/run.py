"""`hasten train`: trains a draft head for a target on its recorded hidden states, in this process."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.outputs.resumable import PROGRESS, ResumableFolder
from hasten.accel.data.chat import end_of_turn
from hasten.accel.data.documents import LIBRARY
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.accel.training.acceptance import HeldOut, deployed, measured, rates_of
from hasten.accel.training.data.records import RecordsMeta
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.data_scaling import MIN_POINTS, LogLinear
from hasten.accel.training.heads.draft_head import CONFIG, DraftHead, TargetFacts, TargetWeights
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.resumable import Plan, ResumableTraining, evaluation_steps
from hasten.accel.training.schedules import Cosine, Schedule, WarmupStableDecay
from hasten.accel.training.trainer import Trainer, TrainSettings
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.jobs.cli.methods import build, target_of
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import model_folder, stop_ids
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer
from hasten.jobs.train.inputs import Reading, TrainingText, digest_of
from hasten.jobs.train.options import TrainConfig
from hasten.jobs.train.recorded import Recording

_SCORE = "mean_acceptance_length"
_NOT_COMPARED = ("run_dir", "cache", "tracking", "output", "overwrite", "threads")


class HeadFolder(ResumableFolder):
    """Folder of a trained head."""

    last_file = CONFIG


def run(config: TrainConfig) -> Path:
    """Train config.head for config.target; returns the path of report.json."""
    started = perf_counter()
    torch.set_num_threads(config.threads)
    head = build(config.head)
    if not isinstance(head, DraftHead):
        raise UserError(f"the head {type(head).__name__} drafts nothing: train it with hasten train_drafter")
    target = model_folder("target", config.target)
    facts, weights = TargetFacts.of(target), TargetWeights.of(target)
    layers = _layers(config, head, facts)
    texts, held_out_texts = _texts(config, target, facts)
    output = Path(config.output) if config.output else Path(str(config.run_dir)) / "head"
    fingerprint = _fingerprint(config, facts, texts, held_out_texts)
    folder = HeadFolder(output, target)
    folder.check(fingerprint, config.overwrite)
    records = Path(config.data.records) if config.data.records else output / PROGRESS / "records"
    data, held = config.data, config.held_out

    def recording(name: str, of: list[TrainingText], settings: list[object], new_tokens: int) -> Recording:
        meta = RecordsMeta(layers, data.top, facts.hidden_size, facts.fingerprint, digest_of(of, settings))
        return Recording(records / name, meta, of, data.shard, new_tokens)

    train_recording = recording("train", texts, [data.max_new_tokens, data.temperature, data.seed], data.max_new_tokens)
    held_recording = recording("held_out", held_out_texts, [held.max_new_tokens], held.max_new_tokens)
    train_recording.check_space()

    run_dir = start(config)
    folder.open(fingerprint, config.overwrite)
    try:
        with tracked(config, "train", run_dir) as tracker:
            tracker.params(plain(config))
            device = torch.device(resolve_device(config.device))
            load = partial(load_target, target, resolve_dtype(config.dtype, device.type), device.type)
            stop = _stop(config, target)
            recorded = train_recording.run(
                load, "recording", stop, Sampling(data.temperature), data.seed, data.in_flight
            )
            held_records = held_recording.run(load, "recording held-out", stop, Sampling(), 0, data.in_flight)
            reads = head.layers(facts)
            windows = PackedWindows(recorded, reads, config.train.window, config.seed)
            held_out = (
                HeldOut.of(
                    [r for path in held_records.shards() for r in held_records.read(path, reads)], held.prompt_length
                )
                if not held.generate
                else HeldOut.of([r for path in held_records.shards() for r in held_records.read(path, reads)])
            )
            if not held_out.tokens:
                raise UserError("held_out holds no token behind its prompts: give longer texts, or a shorter prompt")
            vocabulary = DraftVocabulary.most_frequent(windows.counts(facts.vocabulary), config.draft_vocabulary)
            settings = _settings(config, windows)
            torch.manual_seed(config.seed)
            network = head.build(facts, vocabulary)
            head.initialise(network, weights)
            embedding = weights.embedding.to(device)
            network.attach(embedding)
            network.to(device)
            network.vocabulary = vocabulary.to(device)
            drafter: Drafter = build({"_target_": target_of("drafter", head.drafter)})
            of_step = windows.learned_tokens / len(windows) * settings.batch

            def measure(state: dict[str, Tensor]) -> dict[str, Any]:
                memory = deployed(head, state, facts, vocabulary, embedding)
                stats = measured(head, drafter, memory, held_out, held.budget)
                return {_SCORE: stats.metrics()[_SCORE], "acceptance_per_position": stats.acceptance_per_position}

            seconds = 0.0
            with Progress("training", settings.steps, "step") as progress:

                def report(step: int, parts: Mapping[str, float]) -> None:
                    tracker.metrics({"train": dict(parts)}, step)
                    progress.update(step, f"loss {parts['loss']:.4f}")

                def noted(row: Mapping[str, Any]) -> None:
                    positions = {f"position_{n}": v for n, v in enumerate(row["acceptance_per_position"], 1)}
                    tracker.metrics({"held_out": {_SCORE: row[_SCORE], **positions}}, row["trained_steps"])

                training = ResumableTraining(
                    Trainer(head, network, windows, settings),
                    _plan(config, settings, of_step),
                    output / PROGRESS,
                    measure,
                    _SCORE,
                    report,
                    noted,
                )
                progress.begin(training.progress.step)
                first, begun = training.progress.step, perf_counter()
                done = training.run()
                seconds = perf_counter() - begun
            best = training.best_weights()
            memory = deployed(head, best, facts, vocabulary, embedding)
            rates = rates_of(head, memory, held_out)
            assert done.best is not None
            network.load_state_dict(best)
            network.vocabulary = vocabulary
            extra = {
                "rates": rates,
                "tokens": round(of_step * done.best["trained_steps"]),
                "acceptance": done.best,
            }
            head.save(network, output, facts, extra)
            if config.data.records is None:
                shutil.rmtree(records, ignore_errors=True)
            evaluations = [{**row, "tokens": round(of_step * row["trained_steps"])} for row in done.evaluations]
            trained = (settings.steps - first) * of_step
            untrained = next(row[_SCORE] for row in evaluations if row["step"] == 0 and not row["branch"])
            metrics = {
                _SCORE: done.best[_SCORE],
                "untrained_acceptance_length": untrained,
                "train_tokens_per_second": trained / seconds if trained else None,
                "loss": done.losses[-1],
                "tokens": round(of_step * settings.steps),
                "unique_tokens": windows.learned_tokens,
                "held_out_tokens": held_out.tokens,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "steps": settings.steps,
                "seconds": perf_counter() - started,
                "cpu_seconds": cpu_seconds(),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            path = tracker.report(
                {
                    "job": "train",
                    "config": plain(config),
                    "metrics": metrics,
                    "losses": done.losses,
                    "evaluations": evaluations,
                    "rates": rates,
                    "data_scaling": _scaling(evaluations),
                    "layers": [],
                    "output": str(output.absolute()),
                }
            )
    finally:
        folder.release()
    print(f"acceptance: {untrained:.2f} tokens a pass before training, {metrics[_SCORE]:.2f} after it")
    print(f"to use it: drafter={head.drafter} drafter.head={as_given(output.absolute())}")
    return path


def _layers(config: TrainConfig, head: DraftHead, facts: TargetFacts) -> tuple[int, ...]:
    # A draft model reads none, but a record of the target has one at least.
    layers = tuple(dict.fromkeys((*head.layers(facts), *config.data.layers))) or (FINAL,)
    wrong = [layer for layer in layers if not -1 <= layer <= facts.layers]
    if wrong:
        raise UserError(f"data.layers={wrong} is wrong: the target has hidden states 0 to {facts.layers}, and -1")
    return layers


def _texts(config: TrainConfig, target: Path, facts: TargetFacts) -> tuple[list[TrainingText], list[TrainingText]]:
    """Sequences to train on and to measure on."""
    data, held = config.data, config.held_out
    tokenizer = load_tokenizer(target, config.template)
    begin = begin_of(target, tokenizer, config.bos)
    common = tokenizer, facts.vocabulary, begin, data.sequence_length
    reading = Reading(*common, data.generate, data.prompt_length, data.seed)
    held_reading = Reading(*common, held.generate, held.prompt_length)
    if data.source == [LIBRARY]:
        texts = reading.library("train", data.sequences)
        own = held_reading.library("held_out", held.sequences)
    elif held.source:
        texts, own = reading.files("data.source", data.source, data.sequences), []
    else:
        count = data.sequences + held.sequences
        texts = reading.files("data.source", data.source, count)
        spared = held.sequences if len(texts) == count else max(1, min(held.sequences, len(texts) // 5))
        if len(texts) < 2:
            raise UserError(f"data.source={data.source} holds one sequence: none is left to measure on")
        # Read in the way of held-out sequences, the same places of the files.
        own = held_reading.files("data.source", data.source, len(texts))[-spared:]
        texts = texts[:-spared]
    if held.source:
        own = held_reading.files("held_out.source", held.source, held.sequences)
    limit = facts.max_length
    for new, option, of in ((data.max_new_tokens, "data", texts), (held.max_new_tokens, "held_out", own)):
        longest = max(len(text.tokens) + (text.learned is None) * new for text in of)
        if longest > limit:
            raise UserError(f"{option} has a sequence of {longest} tokens, and the target's context is {limit}")
    return texts, own


def _fingerprint(
    config: TrainConfig, facts: TargetFacts, texts: list[TrainingText], held_out: list[TrainingText]
) -> dict[str, object]:
    """Everything that determines the head."""
    settings: Record = {key: value for key, value in plain(config).items() if key not in _NOT_COMPARED}
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in ("records", "in_flight")}
    flat = {
        f"{key}.{name}": item
        for key, value in settings.items()
        if isinstance(value, dict)
        for name, item in value.items()
    }
    flat |= {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for name in ("train.checkpoint_seconds", "train.checkpoint_steps"):
        flat.pop(name)
    return flat | {"target": facts.fingerprint, "texts": digest_of(texts, []), "held_out": digest_of(held_out, [])}


def _stop(config: TrainConfig, target: Path) -> tuple[int, ...]:
    tokenizer = load_tokenizer(target, config.template)
    turn = end_of_turn(tokenizer)
    return tuple(sorted({*stop_ids(target, tokenizer), *(() if turn is None else (turn,))}))


def _settings(config: TrainConfig, windows: PackedWindows) -> TrainSettings:
    train = config.train
    steps = train.steps or max(1, math.ceil(train.epochs * len(windows) / train.batch))
    schedule: Schedule = Cosine(train.warmup)
    if train.schedule == "wsd":
        schedule = WarmupStableDecay(train.warmup, train.decay)
    return TrainSettings(
        steps=steps,
        batch=train.batch,
        micro_batch=train.micro_batch or train.batch,
        lr=train.lr,
        weight_decay=train.weight_decay,
        clip=train.clip,
        schedule=schedule,
        bfloat16=train.bfloat16,
        seed=config.seed,
    )


def _plan(config: TrainConfig, settings: TrainSettings, of_step: float) -> Plan:
    train, branches = config.train, {}
    for tokens in train.acceptance_at:
        end = round(tokens / of_step)
        if not 1 <= end <= settings.steps:
            raise UserError(
                f"train.acceptance_at={train.acceptance_at} is wrong: expected numbers of tokens from "
                f"{math.ceil(of_step)} to {int(of_step * settings.steps)}, those of the training"
            )
        count = max(1, round(train.decay * end))
        branches[end - count] = count
    evaluate_at = evaluation_steps(settings.steps, train.evaluations)
    return Plan(settings.steps, evaluate_at, branches, train.checkpoint_seconds, train.checkpoint_steps)


def _scaling(evaluations: list[Record]) -> Record | None:
    """The line through the measurements of acceptance_at, and what 2, 4 and 10 times the most tokens would give."""
    rows = [row for row in evaluations if row["branch"]]
    if len(rows) < MIN_POINTS:
        return None
    tokens = [row["tokens"] for row in rows]
    line = LogLinear.fit(tokens, [row[_SCORE] for row in rows])
    predictions = [asdict(line.predict(times * max(tokens))) for times in (2, 4, 10)]
    return {"points": [[row["tokens"], row[_SCORE]] for row in rows], "line": asdict(line), "predictions": predictions}
