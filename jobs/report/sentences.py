"""Sentences of a report: the winner and its lead, how runs ended, and sections without data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.jobs.report import metrics as known
from hasten.jobs.report.comparison import Group, Row, complete


@dataclass(frozen=True)
class Summary:
    """A sentence in two parts: the subject, which pages highlight, and the rest. reference: that of the quality."""

    subject: str
    rest: str
    reference: str = ""

    def __str__(self) -> str:
        return f"{self.reference}: {self.subject} {self.rest}" if self.reference else f"{self.subject} {self.rest}"


def summary(group: Group) -> Summary:
    """The winning setting, its lead, and the Pareto front."""
    return replace(_summary(group), reference=group.reference)


def _summary(group: Group) -> Summary:
    finished = [row for row in group.rows if row.entry.finished]
    if not group.objectives or not finished:
        return Summary(
            _counted(len(finished), f"{group.job} {_noun(group)}"), "finished; there is no metric to compare."
        )
    first = group.objectives[0]
    compared = complete(group.rows, [first.metric])
    metric = known.metric(first.metric)
    if not compared:
        return Summary(f"No {group.job} {_noun(group)}", f"has a value of {metric.title}.")
    best = compared[0]
    value = best.metrics[first.metric] or 0.0
    if len(compared) == 1:
        return Summary(
            best.label,
            f"is the only {_noun(group)} with a value of {metric.title}: {metric.text(value)}{_size(best)}.",
        )
    shared = [row for row in compared if row.winner]
    if len(shared) > 1:
        others = _counted(len(shared) - 1, "other")
        text = f"and {others} share the best {metric.title}, {metric.text(value)}."
    else:
        text = f"won by {metric.title}: {metric.text(value)}{_size(best)}{_ahead(compared, metric, value)}."
    return Summary(best.label, text + _front(group, finished))


def facts(group: Group) -> str:
    """Number of runs or points by status."""
    counts: dict[str, int] = {}
    for row in group.rows:
        counts[row.entry.status] = counts.get(row.entry.status, 0) + 1
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    reference = f" on {group.reference}" if group.reference else ""
    return f"{group.job}{reference}, {_counted(len(group.rows), _noun(group))}: {text}"


def left_out(sections: Sequence[str]) -> str:
    """Line that names the sections without data; empty if there are none."""
    return f"Left out for lack of data: {', '.join(sections)}." if sections else ""


def _noun(group: Group) -> str:
    return "point" if group.sweep else "run"


def _size(row: Row) -> str:
    size = row.metric("bytes")
    return "" if size is None else f" at {known.fitted('bytes', [size]).text(size)}"


def _ahead(compared: Sequence[Row], metric: known.Metric, value: float) -> str:
    """Lead of the best row over the next, as a ratio where both values are positive."""
    other = compared[1].metrics[metric.name] or 0.0
    if value <= 0 or other <= 0:
        return f"; the next, {compared[1].label}, has {metric.text(other)}"
    share = abs(value - other) / other
    if value < other / 2:
        return f", {_rounded(other / value)} times lower than the next, {compared[1].label}"
    if value > 2 * other:
        return f", {_rounded(value / other)} times that of the next, {compared[1].label}"
    text = "less than 1%" if share < 0.01 else f"{share:.0%}"
    return f", {text} {'lower' if value < other else 'higher'} than the next, {compared[1].label}"


def _value_text(row: Row, name: str) -> str:
    value = row.metrics[name] or 0.0
    return f"{known.metric(name).title} {known.fitted(name, [value]).text(value)}"


def _rounded(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def _front(group: Group, finished: Sequence[Row]) -> str:
    """Sentence on the Pareto front; empty if there is none."""
    if not group.front_of:
        return ""
    best = [row for row in group.rows if row.on_front]
    titles = " and ".join(known.metric(objective.metric).title for objective in group.front_of)
    verb = "is" if len(best) == 1 else "are"
    text = f" {len(best)} of {_counted(len(finished), 'setting')} {verb} on the Pareto front of {titles}"
    second = group.front_of[1]
    end = min(best, key=lambda row: second.sign * (row.metrics[second.metric] or 0.0))
    if end.winner or len(best) < 2:
        return text + "."
    word = {"bytes": "smallest", "tokens_per_second": "quickest"}.get(second.metric)
    extreme = f"the {word}" if word else f"the best by {known.metric(second.metric).title}"
    values = ", ".join(_value_text(end, objective.metric) for objective in group.front_of)
    return f"{text}; {extreme} of them is {end.label} ({values})."


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
