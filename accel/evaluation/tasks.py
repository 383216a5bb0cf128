"""Task suites of lm-eval (EleutherAI's lm-evaluation-harness), run on a checkpoint loaded by transformers.

lm-eval loads the whole model into memory, unlike everything else in hasten.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    limit: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    task_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task, {task: {metric: value}}, with standard errors as `metric_stderr`.

    limit: number of documents of each task; None takes all. task_folder: folder with YAML files of further tasks.
    Raises UserError where lm-eval is missing, a task is unknown, or its data set cannot be loaded.
    """
    if not tasks:
        return {}
    manager = check_tasks(tasks, task_folder)
    lm_eval, HFLM, _ = _imported(tasks)
    try:
        model = HFLM(pretrained=str(folder), device=device, batch_size=batch)
        evaluation = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000
        )
    except (OSError, ConnectionError, ValueError) as error:
        # Most often the task's data set is not on this machine and the hub cannot be reached.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tasks={list(tasks)} could not be run: {reason}") from error
    return {task: _numbers(metrics) for task, metrics in evaluation["results"].items()}


def check_tasks(tasks: Sequence[str], task_folder: Path | None = None) -> Any:
    """lm-eval's TaskManager; UserError where lm-eval is missing or a task is unknown. Loads no model and no data."""
    _, _, TaskManager = _imported(tasks)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    check_names(tasks, manager.all_tasks)
    return manager


def _imported(tasks: Sequence[str]) -> tuple[Any, Any, Any]:
    """The module lm_eval and its classes HFLM and TaskManager; UserError where they are not installed."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"tasks={list(tasks)} needs packages that are not installed ({error}): pip install 'lm-eval[hf]'"
        ) from error
    return lm_eval, HFLM, TaskManager


def check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """UserError where a task is not known; it suggests known tasks with a similar name."""
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.5)
            raise UserError(
                f"tasks: lm-eval has no task {task!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists them")
            )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; other filters stay in the name."""
    return {
        name.removesuffix(",none").replace(",", "_"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name
    }
