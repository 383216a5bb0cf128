"""The training of `hasten train`: in this process, or in a group of ranks; its progress, metrics and report."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import TargetWeights
from hasten.accel.training.resumable import Plan, ResumableTraining, Trains, evaluation_steps
from hasten.accel.training.scaling_laws import Row, ScalingLaw
from hasten.accel.training.schedules import Cosine, Schedule, WarmupStableDecay
from hasten.accel.training.setup import SCORE, HeadSetup, Measurement
from hasten.accel.training.trainer import Trainer, TrainSettings
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.arithmetic import resolve_device
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.train.options import TrainConfig
from hasten.jobs.train.ranks import in_group, rank_needs

# Measurements of acceptance_at from which a line with an interval is drawn.
_MIN_POINTS = 3


class HeadTraining:
    """The training of a head's network on recorded windows, measured on held-out records."""

    def __init__(self, config: TrainConfig, setup: HeadSetup) -> None:
        self._config, self._setup = config, setup
        self._windows = windows = setup.windows()
        steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(windows) / config.train.batch))
        self._settings = train_settings(config, steps)
        # The ranks have networks of their own; this process writes the head.
        device = torch.device("cpu" if in_group(config) else resolve_device(config.device))
        weights, vocabulary = TargetWeights.of(setup.target), setup.vocabulary(windows)
        self._network = setup.network(vocabulary, weights, device)
        self._measurement = Measurement(setup, vocabulary, weights.embedding.to(device), self._network)
        self._tokens_of_step = windows.learned_tokens / len(windows) * self._settings.batch
        self._begun: float | None = None
        self._extra: Record = {}

    def run(self, folder: Path, tracker: Tracker) -> tuple[Record, list[dict[str, float]]]:
        """Train, or go on, with checkpoints in a folder; the best network is kept.

        Returns the report's own part, and the usage of each rank of a group.
        """
        settings, config = self._settings, self._config
        with Progress("training", settings.steps, "step") as progress:
            course = _Course(tracker, progress)

            def training_of(
                trainer: Trains, measure: Callable[[dict[str, Tensor]], dict[str, Any]]
            ) -> ResumableTraining:
                plan = plan_of(config, settings, self._tokens_of_step)
                training = ResumableTraining(trainer, plan, folder, measure, SCORE, course.report, course.note)
                if self._begun is None:
                    self._begun = perf_counter()
                    self._first = training.progress.step
                    progress.begin(self._first)
                return training

            if in_group(config):
                # It imports Ray's actors.
                from hasten.cluster.programs.training import GroupTrainer, train_in_groups

                start = partial(
                    GroupTrainer,
                    self._setup,
                    settings,
                    config.train.ranks,
                    config.train.zero,
                    resolve_device(config.device),
                    rank_needs(config),
                )
                group = train_in_groups(start, lambda trainer: training_of(trainer, trainer.measure), folder)
                training, usage, optimizer_bytes = group.training, group.usage, group.optimizer_bytes
            else:
                trainer = Trainer(self._setup.head, self._network, self._windows, settings)
                training, usage = training_of(trainer, self._measurement), []
                training.run()
                optimizer_bytes = trainer.optimizer_bytes()
            assert self._begun is not None
            seconds = perf_counter() - self._begun
        return self._report(training, seconds, optimizer_bytes), usage

    def save(self, output: Path) -> None:
        """Write the best network's folder, after `run`."""
        self._setup.head.save(self._network, output, self._setup.facts, self._extra, self._setup.store)

    def _report(self, training: ResumableTraining, seconds: float, optimizer_bytes: int) -> Record:
        best, done = training.best_weights(), training.progress
        self._network.load_state_dict(best)
        rates = self._measurement.rates(best)
        assert done.best is not None
        tokens = self._tokens(done.best["trained_steps"])
        self._extra = {"rates": rates, "tokens": tokens, "acceptance": done.best}
        evaluations = [{**row, "tokens": self._tokens(row["trained_steps"])} for row in done.evaluations]
        trained = self._tokens(self._settings.steps - self._first)
        metrics = {
            SCORE: done.best[SCORE],
            "untrained_acceptance_length": next(
                row[SCORE] for row in evaluations if row["step"] == 0 and not row["branch"]
            ),
            "train_tokens_per_second": trained / seconds if trained else None,
            "loss": done.losses[-1],
            "tokens": self._tokens(self._settings.steps),
            "unique_tokens": self._windows.learned_tokens,
            "held_out_tokens": self._measurement.held_out.tokens,
            "parameters": sum(parameter.numel() for parameter in self._network.parameters()),
            "optimizer_bytes": optimizer_bytes,
            "steps": self._settings.steps,
        }
        return {
            "metrics": metrics,
            "losses": done.losses,
            "evaluations": evaluations,
            "rates": rates,
            "data_scaling": _scaling(evaluations),
        }

    def _tokens(self, steps: int) -> int:
        """Tokens that so many steps learn, on average."""
        return round(self._tokens_of_step * steps)


class _Course:
    """Reports every step and evaluation once, although those after a checkpoint are repeated by a new group."""

    def __init__(self, tracker: Tracker, progress: Progress) -> None:
        self._tracker, self._progress = tracker, progress
        self._step = 0
        self._evaluated: set[tuple[int, bool]] = set()

    def report(self, step: int, parts: Mapping[str, float]) -> None:
        """Metrics and progress of a step."""
        if step > self._step:
            self._step = step
            self._tracker.metrics({"train": dict(parts)}, step)
        self._progress.update(step, f"loss {parts['loss']:.4f}")

    def note(self, row: Mapping[str, Any]) -> None:
        """Metrics of an evaluation."""
        key = row["step"], row["branch"]
        if key in self._evaluated:
            return
        self._evaluated.add(key)
        positions = {f"position_{n}": v for n, v in enumerate(row["acceptance_per_position"], 1)}
        self._tracker.metrics({"held_out": {SCORE: row[SCORE], **positions}}, row["trained_steps"])


def train_settings(config: TrainConfig, steps: int) -> TrainSettings:
    """Hyper-parameters of a training of this number of steps; UserError for options that contradict each other."""
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


def plan_of(config: TrainConfig, settings: TrainSettings, of_step: float) -> Plan:
    """When what happens. of_step: tokens that a step learns."""
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
    rows = [Row({"tokens": row["tokens"]}, row[SCORE]) for row in evaluations if row["branch"]]
    if len(rows) < _MIN_POINTS:
        return None
    law, most = ScalingLaw.fit(rows), max(row.factors["tokens"] for row in rows)
    intercept, slope = (asdict(interval) for interval in law.coefficients)
    return {
        "points": [[row.factors["tokens"], row.acceptance] for row in rows],
        "line": {"intercept": intercept, "slope": slope, "residual": law.residual},
        "predictions": [{"tokens": times * most, **asdict(law.predict(tokens=times * most))} for times in (2, 4, 10)],
    }
