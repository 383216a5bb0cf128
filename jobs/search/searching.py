"""Runs one search: tracks and draws its steps, and saves its states, so that a stopped run resumes."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from hasten.accel.compression.search.base import Problem, Searcher, State, Step
from hasten.accel.compression.search.measurements import Measure
from hasten.accel.compression.search.moves import Genome
from hasten.accel.outputs.resumable import write_whole
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.progress import Progress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedStates:
    """States of one search, a file per step: a search of more steps resumes one of fewer.

    folder: named after all settings of the search except its output, so that runs with other outputs share it.
    """

    folder: Path

    def latest(self, steps: int) -> State | None:
        """State of the last finished step, at most `steps`; None if there is none."""
        paths = (self._path(step) for step in range(steps, -1, -1))
        saved = next((path for path in paths if path.exists()), None)
        return State.from_json(json.loads(saved.read_text())) if saved else None

    def save(self, state: State) -> None:
        """Save a state; the file is replaced atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(state.to_json(), indent=2) + "\n"
        write_whole(self._path(state.step), lambda temporary: temporary.write_text(content))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.json"


@dataclass
class SearchRun:
    """One searcher with one budget. name: the searcher's. budget: in `unit`. draw: draws a genome.

    evaluated, seconds: candidates of this run's steps and their time, without the first candidates, which wait until
    the evaluators have loaded the model.
    """

    name: str
    searcher: Searcher
    budget: float
    problem: Problem
    measure: Measure
    saved: SavedStates
    draw: Callable[[Genome, Path], Path]
    tracker: Tracker
    unit: str = "bits"
    evaluated: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def answer(self) -> State:
        """Run the search, or resume a stopped one; returns its final state."""
        searcher, state = self.searcher, self.saved.latest(self.searcher.steps)
        title = f"{self.name} at {self.budget:g} {self.unit}"
        with Progress(title, searcher.steps, searcher.step_name) as progress:
            progress.begin(state.step if state else 0)
            if state and state.step:
                _LOG.info("%d %ss are finished already", state.step, searcher.step_name)
            began = perf_counter()
            for step in searcher.search(self.problem, self.measure, state):
                state = step.state
                self.saved.save(state)
                seconds = perf_counter() - began
                progress.update(state.step, f"fitness {state.fitness:.5f}")
                self._track(step, seconds)
                if state.step:
                    self.evaluated += step.stats.evaluated
                    self.seconds += seconds
                began = perf_counter()
            assert state is not None, "a search without a state yields its first candidates"
            return searcher.answer(self.problem, self.measure, state)

    def _track(self, step: Step, seconds: float) -> None:
        state, stats = step
        values = {
            "fitness": state.fitness,
            "fitness_parent": stats.previous_fitness,
            "tokens": state.tokens,
            "candidates": state.evaluated,
            "candidates_per_second": stats.evaluated / seconds if seconds else 0.0,
            "changed": stats.changed,
        }
        self.tracker.metrics({f"{key}/{self.budget:g}": value for key, value in values.items()}, state.step)
        # The map of a step without changes equals the previous one.
        if stats.changed or not state.step:
            unit = self.searcher.step_name
            name = f"{self.name}_{self.budget:g}_{unit}_{state.step:04d}.png"
            self.tracker.figure(self.draw(state.incumbent, self.tracker.run_dir / f"{unit}s" / name))
