"""Points that Optuna chooses: asked one by one as places get free, told as they end; the study is a sqlite file.

Source: Akiba et al. 2019, arXiv:1907.10902.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna import distributions, samplers

from hasten.accel.errors import UserError
from hasten.jobs.common.records import Record
from hasten.jobs.sweep.dimensions import Dimension, as_text

_LOG = logging.getLogger(__name__)
FILE = "study.db"
_NAME = "sweep"


class Study:
    """A study in a folder, made or gone on with. directions: minimize or maximize, one for each metric.

    Of an earlier driver's trials those count that these dimensions could have made.
    """

    def __init__(
        self,
        folder: Path,
        dimensions: Sequence[Dimension],
        directions: Sequence[str],
        sampler: str,
        seed: int,
        trials: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._dimensions = {dimension.key: dimension for dimension in dimensions}
        self._distributions = {dimension.key: _distribution(dimension) for dimension in dimensions}
        self._trials = trials
        file = folder / FILE
        try:
            self._study = _open(file, directions)
        except Exception as error:  # SQLAlchemy's, of a file that is damaged
            raise UserError(f"{file} cannot be used ({str(error).splitlines()[0]}): remove it to start anew") from error
        before = [direction.name.lower() for direction in self._study.directions]
        if before != list(directions):
            raise UserError(
                f"{file} was begun to {', '.join(before)}, not to {', '.join(directions)}: take another run_dir"
            )
        self._leave_out_strangers(file, directions)
        earlier = self._study.get_trials(deepcopy=False)
        # Not the seed alone: it would give the values of the first driver once more.
        self._study.sampler = _sampler(sampler, seed + len(earlier))
        states = optuna.trial.TrialState
        self._open = [trial for trial in earlier if trial.state == states.RUNNING]
        done = [trial for trial in earlier if trial.state == states.COMPLETE]
        known = [trial.params for trial in (*done, *self._open)]
        self._again: list[Record] = []
        for trial in earlier:
            if trial.state == states.FAIL and trial.params not in known:
                self._again.append(trial.params)
                known.append(trial.params)
        self._asked = len(done)

    def ask(self) -> tuple[int, Mapping[str, str]] | None:
        """Number and values of the next trial; None where all have been asked for.

        Trials that an earlier driver left behind come first, then those that failed.
        """
        if not self.left:
            return None
        self._asked += 1
        if self._open:
            left = self._open.pop(0)
            return left.number, self._texts(left.params)
        if self._again:
            self._study.enqueue_trial(self._again.pop(0))
        trial = self._study.ask(self._distributions)
        return trial.number, self._texts(trial.params)

    @property
    def left(self) -> int:
        """How many trials are left to ask for."""
        return max(0, self._trials - self._asked)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """A trial has ended with these values of the metrics; None: it failed."""
        if values is None:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, list(values))

    def _leave_out_strangers(self, file: Path, directions: Sequence[str]) -> None:
        """Begin anew with the trials that fit, if the sweep's options were changed: Optuna cannot mix the others in."""
        trials = self._study.get_trials()
        fitting = [trial for trial in trials if self._could_have_made(trial.params)]
        if len(fitting) == len(trials) and all(trial.distributions == self._distributions for trial in trials):
            return
        # In a file of its own, which takes the other's place whole: a driver that is killed meanwhile loses nothing.
        anew = file.with_suffix(".new")
        anew.unlink(missing_ok=True)
        study = _open(anew, directions)
        for trial in fitting:
            trial.distributions = self._distributions
            study.add_trial(trial)
        study._storage.remove_session()
        anew.replace(file)
        self._study = _open(file, directions)

    def _could_have_made(self, params: Record) -> bool:
        """Whether the parameters are all of this sweep's options, with values that they have."""
        if params.keys() != self._distributions.keys():
            return False
        try:
            return all(
                self._distributions[key]._contains(self._distributions[key].to_internal_repr(value))
                for key, value in params.items()
            )
        except ValueError:  # a text that is no number, or not in the list
            return False

    def _texts(self, params: Record) -> dict[str, str]:
        """Parameters as options' texts, in the order of the words."""
        return {key: as_text(params[key]) for key in self._dimensions}


def _open(file: Path, directions: Sequence[str]) -> optuna.Study:
    """The study of a file, made where there is none."""
    return optuna.create_study(
        storage=f"sqlite:///{file.as_posix()}",
        study_name=_NAME,
        directions=[optuna.study.StudyDirection[direction.upper()] for direction in directions],
        load_if_exists=True,
    )


def _distribution(dimension: Dimension) -> distributions.BaseDistribution:
    if dimension.is_numeric:
        step = dimension.step
        if dimension.is_integer:
            return distributions.IntDistribution(
                int(dimension.low), int(dimension.high), log=dimension.is_log, step=int(step or 1)
            )
        return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.is_log, step=step)
    return distributions.CategoricalDistribution(dimension.values or ())


def _sampler(name: str, seed: int) -> samplers.BaseSampler:
    if name == "tpe":
        # Trials that run count as bad ones meanwhile, so that those that are asked for together differ.
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    if name == "nsgaii":
        return samplers.NSGAIISampler(seed=seed)
    return samplers.RandomSampler(seed=seed)
