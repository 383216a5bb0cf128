"""Points that Optuna chooses: asked for one by one as resources get free, told as they end; stored in a sqlite file.

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
    """A new or resumed study in a folder. directions: minimize or maximize, one for each metric.

    Earlier trials count if all their values are possible with these dimensions.
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
        except Exception as error:  # SQLAlchemy's various errors of a damaged file
            raise UserError(f"{file} cannot be used ({str(error).splitlines()[0]}): remove it to start anew") from error
        before = [direction.name.lower() for direction in self._study.directions]
        if before != list(directions):
            raise UserError(
                f"{file} was begun to {', '.join(before)}, not to {', '.join(directions)}: give another run_dir"
            )
        self._drop_incompatible_trials(file, directions)
        earlier = self._study.get_trials(deepcopy=False)
        # With the same seed, a resumed sampler would draw the first values again.
        self._study.sampler = _sampler(sampler, seed + len(earlier))
        states = optuna.trial.TrialState
        self._interrupted = [trial for trial in earlier if trial.state == states.RUNNING]
        done = [trial for trial in earlier if trial.state == states.COMPLETE]
        known = [trial.params for trial in (*done, *self._interrupted)]
        self._failed_params: list[Record] = []
        for trial in earlier:
            if trial.state == states.FAIL and trial.params not in known:
                self._failed_params.append(trial.params)
                known.append(trial.params)
        self._asked = len(done)

    def ask(self) -> tuple[int, Mapping[str, str]] | None:
        """Number and values of the next trial; None if all have been asked for.

        Unfinished trials of an earlier driver come first, then its failed ones.
        """
        if not self.left:
            return None
        self._asked += 1
        if self._interrupted:
            earlier = self._interrupted.pop(0)
            return earlier.number, self._texts(earlier.params)
        if self._failed_params:
            self._study.enqueue_trial(self._failed_params.pop(0))
        trial = self._study.ask(self._distributions)
        return trial.number, self._texts(trial.params)

    @property
    def left(self) -> int:
        """Number of trials still to ask for."""
        return max(0, self._trials - self._asked)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Note the metrics of a finished trial; None for a failed one."""
        if values is None:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, list(values))

    def _drop_incompatible_trials(self, file: Path, directions: Sequence[str]) -> None:
        """Rebuild the study from the compatible trials if the sweep's options changed: Optuna cannot mix them."""
        trials = self._study.get_trials()
        fitting = [trial for trial in trials if self._is_compatible(trial.params)]
        if len(fitting) == len(trials) and all(trial.distributions == self._distributions for trial in trials):
            return
        # Built in a new file that replaces the old one atomically: a driver killed meanwhile loses nothing.
        rebuilt = file.with_suffix(".new")
        rebuilt.unlink(missing_ok=True)
        study = _open(rebuilt, directions)
        for trial in fitting:
            trial.distributions = self._distributions
            study.add_trial(trial)
        study._storage.remove_session()
        rebuilt.replace(file)
        self._study = _open(file, directions)

    def _is_compatible(self, params: Record) -> bool:
        """Whether the parameters are exactly this sweep's options, with values that it allows."""
        if params.keys() != self._distributions.keys():
            return False
        try:
            return all(
                self._distributions[key]._contains(self._distributions[key].to_internal_repr(value))
                for key, value in params.items()
            )
        except ValueError:  # the text is not a number, or not in the list
            return False

    def _texts(self, params: Record) -> dict[str, str]:
        """Parameters as texts of options, in the order of the words."""
        return {key: as_text(params[key]) for key in self._dimensions}


def _open(file: Path, directions: Sequence[str]) -> optuna.Study:
    """The study of a file, which is created if it does not exist."""
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
        # constant_liar: running trials count as bad, so that trials that run at the same time differ.
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    if name == "nsgaii":
        return samplers.NSGAIISampler(seed=seed)
    return samplers.RandomSampler(seed=seed)
