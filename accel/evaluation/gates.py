"""Quality gates: limits that a compressed model must keep, such as `kl<0.05`, `top1>0.9` or `task:arc_easy>-0.01`."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from hasten.accel.errors import UserError

_RELATIONS = {"<=": le, ">=": ge, "<": lt, ">": gt}
_GATE = re.compile(r"\s*(task:)?([A-Za-z][\w-]*(?:\.\w+)?)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")
_SHORT = {"kl": "kl_divergence", "top1": "top1_agreement", "ppl": "perplexity", "bits": "bits_per_weight"}
# lm-eval's metrics of a task, in the order in which a gate that names none takes one.
_TASK_METRICS = ("acc", "exact_match", "acc_norm")
CHANGE = "change"
FORM = "a metric, a relation and a number, like kl<0.05, top1>0.9, perplexity<=12 or task:arc_easy>-0.01"


@dataclass(frozen=True)
class Gate:
    """A limit on a metric of the report.

    task: whether the metric is `TASK` or `TASK.METRIC` of lm-eval, and the limit is on its change against the original.
    """

    text: str
    metric: str
    relation: str
    limit: float
    task: bool = False

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """The gate that a text names; UserError for another text."""
        match = _GATE.fullmatch(text)
        try:
            limit = float(match[4]) if match else math.nan
        except ValueError:
            match = None
        if match is None:
            raise UserError(f"gate={text} is wrong: expected {FORM}")
        name = match[2]
        return cls(text.strip(), name if match[1] else _SHORT.get(name, name), match[3], limit, bool(match[1]))

    @property
    def task_name(self) -> str:
        """lm-eval's name of the task."""
        return self.metric.partition(".")[0]

    def value(self, metrics: Mapping[str, Any]) -> float:
        """The gate's number among a report's metrics; UserError if there is none."""
        names = [self.metric] if "." in self.metric else [f"{self.metric}.{kind}" for kind in _TASK_METRICS]
        names = [f"{name}_{CHANGE}" for name in names] if self.task else [self.metric]
        value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
        if not isinstance(value, int | float):
            known = ", ".join(sorted(name for name, each in metrics.items() if isinstance(each, int | float)))
            raise UserError(f"gate={self.text} needs {' or '.join(names)}, which was not measured: there are {known}")
        return float(value)

    def holds(self, value: float) -> bool:
        """Whether a value keeps the limit; one that is not a number keeps none."""
        return bool(_RELATIONS[self.relation](value, self.limit))


def parse_gates(texts: Iterable[str]) -> list[Gate]:
    """Gates of an option's texts; UserError names a text that is none."""
    return [Gate.parse(text) for text in texts]


def task_changes(compressed: Mapping[str, float], original: Mapping[str, float]) -> dict[str, float]:
    """Change of every task metric against the original, named `TASK.METRIC_change`; standard errors have none."""
    common = [name for name in compressed if name in original and not name.endswith("_stderr")]
    return {f"{name}_{CHANGE}": compressed[name] - original[name] for name in common}


def mean_errors(layers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean relative error of the layers of each kind, largest first; rows have the keys layer and error."""
    errors: dict[str, list[float]] = {}
    for row in layers:
        if row.get("error") is not None:
            errors.setdefault(layer_kind(row["layer"]), []).append(float(row["error"]))
    means = {kind: sum(values) / len(values) for kind, values in errors.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def layer_kind(name: str) -> str:
    """A layer's name without its block and its expert: `self_attn.q_proj`, `mlp.experts.down_proj`."""
    tail = re.sub(r"^.*?\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.|$)", "", tail)
