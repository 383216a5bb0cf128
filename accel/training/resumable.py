"""The course of a training: steps, evaluations and checkpoints, which resumes wherever it was killed.

`progress.json` names the latest complete checkpoint and holds everything that was measured up to its step. Steps after
it are done again, with the same result.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.accel.outputs.resumable import write_whole

PROGRESS_FILE, BEST_FILE = "progress.json", "best.safetensors"
_CHECKPOINT = "step-{:08d}"

Weights = dict[str, Tensor]


@dataclass
class Progress:
    """What a training has measured up to its checkpoint.

    step: of the checkpoint. losses: of each step. evaluations: what was measured, with `step` and `branch`. best: the
    evaluation whose weights are kept; None before the first.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def measured(self, step: int, branch: bool) -> bool:
        """Whether there is an evaluation at this step."""
        return any(row["step"] == step and row["branch"] == branch for row in self.evaluations)


@dataclass(frozen=True)
class Plan:
    """When what happens.

    evaluate_at: steps after which the network is measured. branches: number of steps of a decay of the learning rate,
    by the step at which it begins: what the network would give if the training ended there, for which it is set aside.
    Checkpoints are written after so many seconds, or steps (0: only seconds).
    """

    steps: int
    evaluate_at: Sequence[int]
    branches: Mapping[int, int] = field(default_factory=dict)
    checkpoint_seconds: float = 120.0
    checkpoint_steps: int = 0


class Trains(Protocol):
    """A trainer, in this process or elsewhere. step: number of steps that are done."""

    step: int

    def train(self, count: int, decay_from: int | None = None, decay_steps: int = 1) -> list[dict[str, float]]:
        """Do `count` steps; the loss of each with its parts, in order."""
        ...

    def weights(self) -> Weights:
        """The network's tensors by name, float32 on the CPU."""
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a new folder."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        ...


class ResumableTraining:
    """A training in a folder. score: name of the number in an evaluation by which the best network is kept.

    measure: numbers by name for weights. report(step, parts): called after every step. measured(evaluation): called
    after each evaluation, those of an earlier run excepted.
    """

    def __init__(
        self,
        trainer: Trains,
        plan: Plan,
        folder: Path,
        measure: Callable[[Weights], dict[str, Any]],
        score: str,
        report: Callable[[int, Mapping[str, float]], None] = lambda step, parts: None,
        measured: Callable[[Mapping[str, Any]], None] = lambda evaluation: None,
    ) -> None:
        self._trainer, self._plan, self._folder = trainer, plan, folder
        self._measure, self._score, self._report, self._measured = measure, score, report, measured
        self.progress = read_progress(folder)
        self._saved_at = time.monotonic()
        self._saved_step = self.progress.step

    def run(self) -> Progress:
        """Train to the last step; returns everything that was measured."""
        trainer, plan, progress = self._trainer, self._plan, self.progress
        if progress.step:
            trainer.load(self._folder / _CHECKPOINT.format(progress.step))
        while True:
            step = trainer.step
            if step in plan.branches and not progress.measured(step, branch=True):
                self._branch(step)
            if (step in plan.evaluate_at or step == plan.steps) and not progress.measured(step, branch=False):
                self._evaluate(step, step)
            if step >= plan.steps:
                break
            self._do()
            if self._is_due():
                self._save()
        if self._saved_step < trainer.step:
            self._save()
        self._write()
        return progress

    def best_weights(self) -> Weights:
        """The network with the best score."""
        weights: Weights = load_file(self._folder / BEST_FILE)
        return weights

    def _do(self) -> None:
        (parts,) = self._trainer.train(1)
        self.progress.losses.append(parts["loss"])
        self._report(self._trainer.step, parts)

    def _evaluate(self, step: int, trained: int, branch: bool = False) -> None:
        weights = self._trainer.weights()
        row = {"step": step, "branch": branch, "trained_steps": trained, **self._measure(weights)}
        best = self.progress.best
        # A branch is only for the curve: the training itself ends with a decay, too.
        if not branch and (best is None or row[self._score] > best[self._score]):
            write_whole(self._folder / BEST_FILE, lambda temporary: save_file(weights, temporary))
            self.progress.best = row
        self.progress.evaluations.append(row)
        self._measured(row)

    def _branch(self, step: int) -> None:
        """Measure the network after a decay that begins here, and put it back."""
        if self._saved_step != step or not step:
            self._save()
        count = self._plan.branches[step]
        self._trainer.train(count, step, count)
        self._evaluate(step, step + count, branch=True)
        self._trainer.load(self._folder / _CHECKPOINT.format(step))
        self._write()

    def _is_due(self) -> bool:
        plan, done = self._plan, self._trainer.step - self._saved_step
        by_steps = plan.checkpoint_steps and done >= plan.checkpoint_steps
        return bool(by_steps) or time.monotonic() - self._saved_at >= plan.checkpoint_seconds

    def _save(self) -> None:
        step = self._trainer.step
        folder = self._folder / _CHECKPOINT.format(step)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote it
        self._trainer.save(folder)
        self.progress.step = self._saved_step = step
        self._write()
        self._saved_at = time.monotonic()
        for other in self._folder.glob(_CHECKPOINT.replace("{:08d}", "*")):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _write(self) -> None:
        # Evaluations after the checkpoint's step would be measured again, and losses appended twice.
        kept = asdict(self.progress)
        kept["losses"] = kept["losses"][: self.progress.step]
        text = json.dumps(kept)
        write_whole(self._folder / PROGRESS_FILE, lambda temporary: Path(temporary).write_text(text))


def read_progress(folder: Path) -> Progress:
    """What an earlier run left in the folder, up to its latest checkpoint; empty if there is none."""
    path = folder / PROGRESS_FILE
    if not path.is_file():
        return Progress()
    return Progress(**json.loads(path.read_text()))


def evaluation_steps(steps: int, count: int) -> list[int]:
    """`count` steps at equal distances, the last one among them, and step 0."""
    return sorted({0, *(round(steps * number / count) for number in range(1, count + 1))})
