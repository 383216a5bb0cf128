"""Options and values that make a job fit which does not: each candidate is planned, and the fastest come first."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

from hasten.accel.errors import UserError
from hasten.jobs.cli.options import set_value
from hasten.jobs.common.schema import Run

C = TypeVar("C", bound=Run)
# Options that are changed together, and their new values.
Changes = list[tuple[str, object]]
# From a config to its planned seconds and to what fits nowhere.
Judge = Callable[[C], tuple[float, list[str]]]

# Tried in this order; the first options change results little or not at all. Numbers are halved.
_LESSENED = (
    "calibration.batch",
    "search.batch",
    "batch",
    "text.batch",
    "in_flight",
    "max_draft_tokens",
    "prefill_chunk",
    "propagate",
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


def advise(config: C, judge: Judge[C]) -> list[Changes]:
    """Sets of (option, value) pairs with which the job fits, the fastest first; empty if there is none.

    A single option is preferred. If none is enough, the largest changes of several options are combined, in the order
    of their cost in quality.
    """
    moves = {key: list(_candidates(config, key)) for key in [*_LESSENED, "dtype"]}
    moves["workers"] = [*moves.get("workers", []), *_more_workers(config)]
    fitting = []
    for candidates in moves.values():
        for row in candidates:
            changed = _judged(config, row, judge)
            if changed is not None and not changed[1]:
                fitting.append((changed[0], row))
                break
    if fitting:
        return [row for _, row in sorted(fitting, key=lambda pair: pair[0])]
    together: dict[str, object] = {}
    for key, candidates in moves.items():
        if key == "workers":
            candidates = _more_workers(config)
        if not candidates:
            continue
        together |= dict(candidates[-1])
        changed = _judged(config, list(together.items()), judge)
        if changed is not None and not changed[1]:
            return [_needed_options(config, together, judge)]
    return []


def with_options(config: C, row: Iterable[tuple[str, object]]) -> C:
    """A copy of the config with other values of these options."""
    changed = copy.deepcopy(config)
    for key, value in row:
        set_value(changed, key, value)
    return changed


def _needed_options(config: C, together: dict[str, object], judge: Judge[C]) -> Changes:
    """The combined changes without those that are not needed."""
    for key in list(together):
        others = {name: value for name, value in together.items() if name != key}
        changed = _judged(config, list(others.items()), judge)
        if others and changed is not None and not changed[1]:
            together = others
    return list(together.items())


def _judged(config: C, row: Changes, judge: Judge[C]) -> tuple[float, list[str]] | None:
    try:
        return judge(with_options(config, row))
    except UserError:  # the options contradict each other
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
    if key == "propagate":
        # Sequences that wait in the middle of a block hold more than between blocks.
        if value == "sequential":
            yield [(key, "quantized")]
        return
    least = 2 if key.endswith("sequence_length") else 1
    while isinstance(value, int) and not isinstance(value, bool) and value // 2 >= least:
        value //= 2
        yield [(key, value)]


def _more_workers(config: Run) -> list[Changes]:
    """Larger numbers of workers, which split the shared work, with as many calibration shards as they need."""
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
