"""The option `gate` of jobs that measure a checkpoint's quality."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.accel.evaluation.gates import Gate, mean_errors, parse_gates, task_changes
from hasten.accel.evaluation.tasks import check_tasks, run_tasks
from hasten.jobs.common.records import Record
from hasten.jobs.descriptors.metrics import CHECKPOINT

# Exit code of a command whose run ended well, but whose checkpoint does not keep a limit.
EXIT_CODE = 3
_KINDS = 3
_OF_QUALITY = ("kl_divergence", "top1_agreement", "perplexity", "perplexity_original")
_KNOWN = (*(metric.name for metric in CHECKPOINT), "perplexity_original")


def check_gates(texts: Sequence[str], sequences: int, compared: bool = True, tasks: Sequence[str] = ()) -> list[Gate]:
    """Gates of the option, before any work; UserError for a gate that the run could not judge.

    sequences: evaluation.sequences of the job. compared: whether there is an original to compare with. tasks: those of
    lm-eval that the job runs, whose metrics have limits as TASK.METRIC.
    """
    gates = parse_gates(texts)
    for gate in gates:
        if not gate.task and gate.metric not in _KNOWN and gate.task_name not in tasks:
            raise UserError(f"gate={gate.text} names no metric: there are {', '.join(_KNOWN)}, and task:TASK")
        if gate.metric in _OF_QUALITY and not gate.task and not sequences:
            raise UserError(f"gate={gate.text} needs an evaluation: give evaluation.sequences above 0")
        if (gate.task or gate.metric in _OF_QUALITY[:2]) and not compared:
            raise UserError(f"gate={gate.text} compares with the original, which is not known: give original=PATH")
    if tasks := tasks_of(gates):
        check_tasks(tasks)
    return gates


def tasks_of(gates: Sequence[Gate]) -> list[str]:
    """Tasks that gates name, each once."""
    return list(dict.fromkeys(gate.task_name for gate in gates if gate.task))


def task_metrics(tasks: Sequence[str], folder: Path, device: str, batch: int = 8) -> dict[str, float]:
    """Metrics of lm-eval's tasks on a checkpoint, named TASK.METRIC."""
    results = run_tasks(folder, tasks, batch=batch, device=device) if tasks else {}
    return {f"{task}.{name}": value for task, metrics in results.items() for name, value in metrics.items()}


def compared_tasks(
    gates: Sequence[Gate], folders: Sequence[Path], original: Path, device: str, batch: int = 8
) -> list[dict[str, float]]:
    """For each folder, metrics of the tasks that gates name, and their changes against the original."""
    tasks = tasks_of(gates)
    compressed = [task_metrics(tasks, folder, device, batch) for folder in folders]
    before = task_metrics(tasks, original, device, batch)
    return [metrics | task_changes(metrics, before) for metrics in compressed]


def judge(gates: Sequence[Gate], metrics: Record, layers: Callable[[], Sequence[Record]]) -> list[Record]:
    """The report's rows on gates: gate, value, passed.

    Rows of failed gates also have errors: the kinds of layers with the largest mean relative error. layers: returns
    rows with the keys layer and error; called only if a gate fails.
    """
    rows: list[Record] = []
    errors: dict[str, float] | None = None
    for gate in gates:
        value = gate.value(metrics)
        row: Record = {"gate": gate.text, "value": value, "passed": gate.holds(value)}
        if not row["passed"]:
            errors = mean_errors(layers()) if errors is None else errors
            row["errors"] = dict(list(errors.items())[:_KINDS])
        rows.append(row)
    return rows


def print_gates(report: Record) -> None:
    """Print a line for each gate."""
    for row in report["gates"]:
        budget = f" at {row['budget']:g} bits" if "budget" in row else ""
        line = f"gate {row['gate']}{budget}: {'passed' if row['passed'] else 'FAILED'}, {row['value']:.5g}"
        if row.get("errors"):
            kinds = ", ".join(f"{kind} {error:.3g}" for kind, error in row["errors"].items())
            line += f"; largest mean relative error: {kinds}"
        print(line)


def exit_code(report: Path) -> int:
    """3 if the report has a failed gate, else 0."""
    gates = json.loads(report.read_text(encoding="utf-8")).get("gates", []) if report.suffix == ".json" else []
    return 0 if all(row["passed"] for row in gates) else EXIT_CODE
