"""Which option makes a job fit that does not, and at what value: all candidates are planned, the quickest first."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

from hasten.accel.errors import UserError
from hasten.jobs.cli.options import set_value
from hasten.jobs.common.schema import Run

C = TypeVar("C", bound=Run)
# Options that are changed together, with their values.
Changes = list[tuple[str, object]]
# Seconds of a config, and what it lacks.
Judge = Callable[[C], tuple[float, list[str]]]

# Tried in this order; the first ones change no result or hardly any.
_HALVED = (
    "calibration.batch",
    "search.batch",
    "batch",
    "text.batch",
    "in_flight",
    "max_draft_tokens",
    "prefill_chunk",
    "workers",
    "threads",
    "target.batch",
    "draft.batch",
    "calibration.sequences",
    "search.sequences",
    "evaluation.sequences",
    "text.sequences",
    "calibration.sequence_length",
    "max_new_tokens",
)
_DOUBLINGS = 7


def advise(config: C, tried: Judge[C]) -> list[Changes]:
    """Sets of (option, value) with which nothing is lacking, the quickest first; none where no set of options helps.

    tried: seconds of a config, and what it lacks. An option alone comes before several; several are put together from
    what each option can do, in the order of what they cost in quality.
    """
    moves = {key: list(_candidates(config, key)) for key in [*_HALVED, "dtype"]}
    moves["workers"] = [*moves.get("workers", []), *_more_workers(config)]
    found = []
    for candidates in moves.values():
        for row in candidates:
            changed = _tried(config, row, tried)
            if changed is not None and not changed[1]:
                found.append((changed[0], row))
                break
    if found:
        return [row for _, row in sorted(found, key=lambda each: each[0])]
    together: dict[str, object] = {}
    for key, candidates in moves.items():
        if key == "workers":
            candidates = _more_workers(config)
        if not candidates:
            continue
        together |= dict(candidates[-1])
        changed = _tried(config, list(together.items()), tried)
        if changed is not None and not changed[1]:
            return [_spared(config, together, tried)]
    return []


def with_options(config: C, row: Iterable[tuple[str, object]]) -> C:
    """A copy of the config with some options changed."""
    changed = copy.deepcopy(config)
    for key, value in row:
        set_value(changed, key, value)
    return changed


def _spared(config: C, together: dict[str, object], tried: Judge[C]) -> Changes:
    """The options that are needed: each is left out if the rest is enough."""
    for key in list(together):
        rest = {name: value for name, value in together.items() if name != key}
        changed = _tried(config, list(rest.items()), tried)
        if rest and changed is not None and not changed[1]:
            together = rest
    return list(together.items())


def _tried(config: C, row: Changes, tried: Judge[C]) -> tuple[float, list[str]] | None:
    try:
        return tried(with_options(config, row))
    except UserError:  # options that make no sense together
        return None


def _value(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _candidates(config: Run, key: str) -> Iterable[Changes]:
    """Other values of an option, the smallest change first."""
    value = _value(config, key)
    if key == "dtype":
        if value in ("auto", "float32"):
            yield [(key, "bfloat16")]
        return
    least = 2 if key.endswith("sequence_length") else 1
    while isinstance(value, int) and not isinstance(value, bool) and value // 2 >= least:
        value //= 2
        yield [(key, value)]


def _more_workers(config: Run) -> list[Changes]:
    """More processes, which share what is shared; with as many chunks as they need."""
    workers, shards = _value(config, "workers"), _value(config, "calibration.shards")
    if not isinstance(workers, int):
        return []
    rows: list[Changes] = []
    for power in range(1, _DOUBLINGS + 1):
        more = workers * 2**power
        row: Changes = [("workers", more)]
        if isinstance(shards, int) and more > shards:
            row.append(("calibration.shards", more))
        rows.append(row)
    return rows
