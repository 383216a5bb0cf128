"""`hasten train`: trains a draft head for a target on its recorded hidden states, in this process."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hasten.accel.compression.outputs.resumable import PROGRESS, ResumableFolder
from hasten.accel.data.chat import end_of_turn
from hasten.accel.data.documents import LIBRARY
from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.drafters.heads.base import HeadMemory
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.accel.training.acceptance import HeldOut, deployed, measured, rates_of
from hasten.accel.training.data.records import Records, RecordsMeta
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.heads.draft_head import CONFIG, DraftHead, TargetFacts, TargetWeights
from hasten.accel.training.heads.stored import BFLOAT16
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.resumable import Plan, ResumableTraining, evaluation_steps
from hasten.accel.training.scaling_laws import Row, ScalingLaw
from hasten.accel.training.schedules import Cosine, Schedule, WarmupStableDecay
from hasten.accel.training.trainer import Trainer, TrainSettings
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
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
# Measurements of acceptance_at from which a line with an interval is drawn.
_MIN_POINTS = 3
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
    _settings(config, 1)  # checks the options, before anything is recorded
    if not head.reads_target and config.store != BFLOAT16:
        raise UserError(f"store={config.store} is wrong: a draft model is a checkpoint, which is stored in {BFLOAT16}")
    target = model_folder("target", config.target)
    facts, weights = TargetFacts.of(target), TargetWeights.of(target)
    texts = _texts(config, target, facts)
    output = Path(config.output) if config.output else Path(str(config.run_dir)) / "head"
    fingerprint = _fingerprint(config, facts, *texts)
    folder = HeadFolder(output, target)
    folder.check(fingerprint, config.overwrite)
    records = Path(config.data.records) if config.data.records else output / PROGRESS / "records"
    recordings = _recordings(config, records, _layers(config, head, facts), facts, *texts)

    run_dir = start(config)
    folder.open(fingerprint, config.overwrite)
    try:
        with tracked(config, "train", run_dir) as tracker:
            tracker.params(plain(config))
            recorded, held_records = _recorded(config, target, *recordings)
            reads = head.layers(facts)
            windows = PackedWindows(recorded, reads, config.train.window, config.seed)
            held_out = _held_out(config, held_records, reads)
            training = _HeadTraining(config, head, facts, weights, windows, held_out)
            report = training.run(output / PROGRESS, tracker)
            training.save(output)
            if config.data.records is None:
                shutil.rmtree(records, ignore_errors=True)
            usage = {
                "seconds": perf_counter() - started,
                "cpu_seconds": cpu_seconds(),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            metrics = report["metrics"] | usage
            common = {"job": "train", "config": plain(config), "layers": [], "output": str(output.absolute())}
            path = tracker.report(common | report | {"metrics": metrics})
    finally:
        folder.release()
    before, after = metrics["untrained_acceptance_length"], metrics[_SCORE]
    print(f"acceptance: {before:.2f} tokens a pass before training, {after:.2f} after it")
    option = "drafter.head" if training.drafter.reads_target else "draft"
    print(f"to use it: drafter={head.drafter} {option}={as_given(output.absolute())}")
    return path


class _HeadTraining:
    """The training of a head's network on recorded windows, measured on held-out records."""

    def __init__(
        self,
        config: TrainConfig,
        head: DraftHead,
        facts: TargetFacts,
        weights: TargetWeights,
        windows: PackedWindows,
        held_out: HeldOut,
    ) -> None:
        self._config, self._head, self._facts = config, head, facts
        self._windows, self._held_out = windows, held_out
        steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(windows) / config.train.batch))
        self._settings = _settings(config, steps)
        self._vocabulary = DraftVocabulary.most_frequent(windows.counts(facts.vocabulary), config.draft_vocabulary)
        device = torch.device(resolve_device(config.device))
        torch.manual_seed(config.seed)
        self._network = head.build(facts, self._vocabulary)
        head.initialise(self._network, weights)
        self._embedding = weights.embedding.to(device)
        self._network.attach(self._embedding)
        self._network.to(device)
        # That of the network: a draft model has all ids, whatever the option says.
        self._network.vocabulary = self._network.vocabulary.to(device)
        self.drafter: Drafter = build({"_target_": target_of("drafter", head.drafter)})
        self._tokens_of_step = windows.learned_tokens / len(windows) * self._settings.batch
        self._extra: Record = {}

    def run(self, folder: Path, tracker: Tracker) -> Record:
        """Train, or go on, with checkpoints in a folder; returns the report's own part. The best network is kept."""
        settings = self._settings
        with Progress("training", settings.steps, "step") as progress:

            def report(step: int, parts: Mapping[str, float]) -> None:
                tracker.metrics({"train": dict(parts)}, step)
                progress.update(step, f"loss {parts['loss']:.4f}")

            def noted(row: Mapping[str, Any]) -> None:
                positions = {f"position_{n}": v for n, v in enumerate(row["acceptance_per_position"], 1)}
                tracker.metrics({"held_out": {_SCORE: row[_SCORE], **positions}}, row["trained_steps"])

            training = ResumableTraining(
                Trainer(self._head, self._network, self._windows, settings),
                _plan(self._config, settings, self._tokens_of_step),
                folder,
                self._measure,
                _SCORE,
                report,
                noted,
            )
            first, begun = training.progress.step, perf_counter()
            progress.begin(first)
            done = training.run()
            seconds = perf_counter() - begun
        best = training.best_weights()
        self._network.load_state_dict(best)
        rates = rates_of(self._head, self._deployed(best), self._held_out)
        assert done.best is not None
        tokens = self._tokens(done.best["trained_steps"])
        self._extra = {"rates": rates, "tokens": tokens, "acceptance": done.best}
        evaluations = [{**row, "tokens": self._tokens(row["trained_steps"])} for row in done.evaluations]
        trained = self._tokens(settings.steps - first)
        metrics = {
            _SCORE: done.best[_SCORE],
            "untrained_acceptance_length": next(
                row[_SCORE] for row in evaluations if row["step"] == 0 and not row["branch"]
            ),
            "train_tokens_per_second": trained / seconds if trained else None,
            "loss": done.losses[-1],
            "tokens": self._tokens(settings.steps),
            "unique_tokens": self._windows.learned_tokens,
            "held_out_tokens": self._held_out.tokens,
            "parameters": sum(parameter.numel() for parameter in self._network.parameters()),
            "steps": settings.steps,
        }
        return {
            "metrics": metrics,
            "losses": done.losses,
            "evaluations": evaluations,
            "rates": rates,
            "data_scaling": _scaling(evaluations),
        }

    def save(self, output: Path) -> None:
        """Write the best network's folder, after `run`."""
        self._head.save(self._network, output, self._facts, self._extra, self._config.store)

    def _tokens(self, steps: int) -> int:
        """Tokens that so many steps learn, on average."""
        return round(self._tokens_of_step * steps)

    def _measure(self, state: dict[str, Tensor]) -> dict[str, Any]:
        budget = self._config.held_out.budget
        stats = measured(self._head, self.drafter, self._deployed(state), self._held_out, budget)
        return {_SCORE: stats.metrics()[_SCORE], "acceptance_per_position": stats.acceptance_per_position}

    def _deployed(self, state: dict[str, Tensor]) -> HeadMemory:
        return deployed(self._head, state, self._facts, self._vocabulary, self._embedding, self._config.store)


def _recordings(
    config: TrainConfig,
    folder: Path,
    layers: tuple[int, ...],
    facts: TargetFacts,
    texts: list[TrainingText],
    held_out: list[TrainingText],
) -> tuple[Recording, Recording]:
    """Recordings of both kinds of sequences; UserError if the disk has no room for those to train on."""
    data, held = config.data, config.held_out

    def recording(name: str, of: list[TrainingText], settings: list[object], new_tokens: int) -> Recording:
        meta = RecordsMeta(layers, data.top, facts.hidden_size, facts.fingerprint, digest_of(of, settings))
        return Recording(folder / name, meta, of, data.shard, new_tokens)

    answers: list[object] = [data.max_new_tokens, data.temperature, data.seed]
    train = recording("train", texts, answers, data.max_new_tokens)
    train.check_space()
    return train, recording("held_out", held_out, [held.max_new_tokens], held.max_new_tokens)


def _recorded(config: TrainConfig, target: Path, train: Recording, held_out: Recording) -> tuple[Records, Records]:
    """The records of both, of which the missing ones are made; held-out prompts are answered greedily."""
    data, device = config.data, resolve_device(config.device)
    load = cache(partial(load_target, target, resolve_dtype(config.dtype, device), device))
    stop = _stop(config, target)
    return (
        train.run(load, "recording", stop, Sampling(data.temperature), data.seed, data.in_flight),
        held_out.run(load, "recording held-out", stop, Sampling(), 0, data.in_flight),
    )


def _held_out(config: TrainConfig, records: Records, layers: Sequence[int]) -> HeldOut:
    """The records to measure on; of texts the first tokens are the prompt. UserError if nothing is left."""
    held = config.held_out
    sequences = [record for path in records.shards() for record in records.read(path, layers)]
    held_out = HeldOut.of(sequences, 1 if held.generate else held.prompt_length)
    if not held_out.tokens:
        raise UserError("held_out holds no token behind its prompts: give longer texts, or a shorter prompt")
    return held_out


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


def _settings(config: TrainConfig, steps: int) -> TrainSettings:
    train = config.train
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
    """The law through the measurements of acceptance_at, and what 2, 4 and 10 times the most tokens would give.

    None for fewer measurements than a law with an interval needs.
    """
    rows = [Row({"tokens": row["tokens"]}, row[_SCORE]) for row in evaluations if row["branch"]]
    if len(rows) < _MIN_POINTS:
        return None
    law, most = ScalingLaw.fit(rows), max(row.factors["tokens"] for row in rows)
    intercept, slope = (asdict(interval) for interval in law.coefficients)
    return {
        "points": [[row.factors["tokens"], row.acceptance] for row in rows],
        "line": {"intercept": intercept, "slope": slope, "residual": law.residual},
        "predictions": [{"tokens": times * most, **asdict(law.predict(tokens=times * most))} for times in (2, 4, 10)],
    }
