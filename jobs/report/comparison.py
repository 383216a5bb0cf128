"""Compares runs of the same job: settings that differ, metrics, the winner and the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.jobs.descriptors.metrics import QUALITY
from hasten.jobs.report import metrics as known
from hasten.jobs.report.pareto import front
from hasten.jobs.report.reading import Entry, Objective, Source
from hasten.jobs.report.references import described, reference_numbers
from hasten.jobs.report.settings import common, differing, settings, shown


@dataclass(frozen=True)
class Row:
    """An entry with its rank. number: position by the first objective, from 1, continued over all tables.

    reference: number of what its quality refers to; None if it has none.
    """

    number: int
    entry: Entry
    values: Mapping[str, str]
    metrics: Mapping[str, float | None]
    winner: bool = False
    on_front: bool = False
    reference: int | None = None

    @property
    def label(self) -> str:
        """Settings that differ from other rows; the name of the run if there are none."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or self.entry.name

    @property
    def short(self) -> str:
        """Number and values of the settings, a label for plots."""
        return f"{self.number}: {' '.join(self.values.values()) or self.entry.name}"

    def metric(self, name: str) -> float | None:
        """Value of a metric; None if it is missing or the run did not finish."""
        return self.metrics.get(name) if self.entry.finished else None


@dataclass(frozen=True)
class Group:
    """Rows of one job and one reference, best first. front_of: objectives of the Pareto front, () if there is no front.

    reference: options that tell what the rows' quality refers to from that of the job's other groups; else empty.
    """

    job: str
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    metrics: tuple[str, ...]
    objectives: tuple[Objective, ...]
    front_of: tuple[Objective, ...]
    common: Mapping[str, str]
    sweep: bool
    reference: str = ""

    @property
    def winner(self) -> Row | None:
        """The first of the best rows; None if there is nothing to compare."""
        return next((row for row in self.rows if row.winner), None)

    @property
    def failures(self) -> list[Row]:
        """Rows that failed."""
        return [row for row in self.rows if row.entry.failure]


def compare(sources: Sequence[Source]) -> list[Group]:
    """A group for every job, and for every original and evaluation text of its runs, in order of appearance."""
    entries = [entry for source in sources for entry in source.entries]
    members: dict[str, dict[int | None, list[Entry]]] = {}
    for entry, number in zip(entries, reference_numbers(entries), strict=True):
        members.setdefault(entry.job, {}).setdefault(number, []).append(entry)
    groups: list[Group] = []
    for job, by_reference in members.items():
        texts = described(by_reference)
        for number, some in by_reference.items():
            numbered = sum(len(group.rows) for group in groups)
            groups.append(_group(job, sources, some, numbered, number, texts[number]))
    return groups


def quality_of(groups: Sequence[Group]) -> Objective | None:
    """The quality metric of the charts: the first objective on quality, else one that rows have, else None."""
    names = [objective for group in groups for objective in group.objectives if objective.metric in QUALITY]
    if names:
        return names[0]
    present = [name for name in QUALITY if any(row.metric(name) is not None for group in groups for row in group.rows)]
    return _objective(present[0]) if present else None


def with_quality_of_checkpoints(groups: Sequence[Group]) -> list[Group]:
    """The groups, in which rows that decode a checkpoint get the quality that another row measured for it.

    Compression runs measure quality and decoding runs speed; joined, they give quality against speed.
    """
    measured: dict[str, Row] = {}
    for group in groups:
        for row in group.rows:
            has_quality = any(row.metric(name) is not None for name in QUALITY)
            if has_quality and row.entry.report.get("output"):
                measured.setdefault(_absolute(row.entry.report["output"]), row)
    return [replace(group, rows=tuple(_joined(row, measured) for row in group.rows)) for group in groups]


def _joined(row: Row, measured: Mapping[str, Row]) -> Row:
    target = row.entry.config.get("target")
    if not isinstance(target, str) or row.metric("tokens_per_second") is None:
        return row
    other = measured.get(_absolute(target))
    if other is None:
        return row
    figures = {name: other.metric(name) for name in QUALITY if other.metric(name) is not None}
    return replace(row, metrics={**figures, **row.metrics}, reference=other.reference)


def _absolute(path: object) -> str:
    return str(Path(str(path)).expanduser().absolute())


def _group(
    job: str, sources: Sequence[Source], entries: Sequence[Entry], numbered: int, reference: int | None, text: str
) -> Group:
    sources = [source for source in sources if any(entry in entries for entry in source.entries)]
    keys = differing(sources, entries)
    numbers = [{name: known.number(value) for name, value in entry.metrics.items()} for entry in entries]
    finished = [row for row, entry in zip(numbers, entries, strict=True) if entry.finished]
    objectives = next((source.objectives for source in sources if _have_values(source.objectives, finished)), ())
    objectives = objectives or _default(finished)
    order = sorted(range(len(entries)), key=lambda index: _rank(entries[index], numbers[index], objectives))
    rows = []
    for place, index in enumerate(order):
        known_settings = settings(entries[index])
        values = {key: shown(known_settings[key]) for key in keys if key in known_settings}
        rows.append(Row(numbered + place + 1, entries[index], values, numbers[index], reference=reference))
    front_of = _front_of(objectives, finished)
    return Group(
        job=job,
        rows=tuple(_marked(rows, objectives, front_of)),
        settings=tuple(keys),
        metrics=tuple(known.columns([objective.metric for objective in objectives], finished)),
        objectives=objectives,
        front_of=front_of,
        common=common(entries),
        sweep=any(source.varied is not None for source in sources),
        reference=text,
    )


def _marked(rows: Sequence[Row], objectives: Sequence[Objective], front_of: Sequence[Objective]) -> list[Row]:
    placed = complete(rows, [objective.metric for objective in front_of]) if front_of else []
    points = [tuple(row.metrics[objective.metric] or 0.0 for objective in front_of) for row in placed]
    best = {placed[index].number for index in front(points, [objective.sign for objective in front_of])}
    compared = complete(rows, [objectives[0].metric]) if objectives else []
    won = set()
    if len(compared) > 1:
        won = {row.number for row in compared if _values(row, objectives) == _values(compared[0], objectives)}
    return [replace(row, winner=row.number in won, on_front=row.number in best) for row in rows]


def _values(row: Row, objectives: Sequence[Objective]) -> list[float | None]:
    return [row.metric(objective.metric) for objective in objectives]


def complete(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Finished rows that have all these metrics."""
    return [row for row in rows if all(row.metric(name) is not None for name in names)]


def _rank(
    entry: Entry, metrics: Mapping[str, float | None], objectives: Sequence[Objective]
) -> tuple[bool, bool, tuple[float, ...]]:
    """Sort key: best rows first, then rows without a value, then unfinished ones."""
    values = [metrics.get(objective.metric) for objective in objectives]
    costs = tuple(objective.sign * (value or 0.0) for objective, value in zip(objectives, values, strict=True))
    return (not entry.finished, bool(values) and values[0] is None, costs)


def _have_values(objectives: Sequence[Objective], finished: Sequence[Mapping[str, float | None]]) -> bool:
    return bool(objectives) and any(row.get(objectives[0].metric) is not None for row in finished)


def _default(finished: Sequence[Mapping[str, float | None]]) -> tuple[Objective, ...]:
    """Objective of runs for which no sweep names one."""
    for name in ("kl_divergence", "perplexity", "tokens_per_second", "tokens_per_step"):
        if any(row.get(name) is not None for row in finished):
            return (_objective(name),)
    return ()


def _front_of(objectives: Sequence[Objective], finished: Sequence[Mapping[str, float | None]]) -> tuple[Objective, ...]:
    """Objectives of the Pareto front: those of the sweep, or quality and its cost; () if runs lack these metrics."""
    if len(objectives) > 1:
        return tuple(objectives)
    for cost in ("bytes", "tokens_per_second"):
        if objectives and objectives[0].metric in QUALITY:
            both = [row for row in finished if None not in (row.get(cost), row.get(objectives[0].metric))]
            if len(both) > 1:
                return (objectives[0], _objective(cost))
    return ()


def _objective(name: str) -> Objective:
    return Objective(name, known.metric(name).better or "minimize")
