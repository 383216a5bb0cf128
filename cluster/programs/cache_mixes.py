"""Measurements of mixed caches on a cluster: tasks of several mixtures each, on prompts that a process reads once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.cache.levels import Mix, MixMeasurement, MixResult
from hasten.accel.cache.statistics import read_layers
from hasten.cluster.programs.caches import ModelInputs, load_model
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results

# A mixture, and the text that it is measured on.
MixOnText = tuple[Mix, int]


@dataclass(frozen=True)
class MixInputs(ModelInputs):
    """What all mixtures are measured on. windows: (N, T) of text, of which `context` tokens are the prompt.

    key: equal for equal inputs. statistics: files of calibrated statistics, by name.
    """

    windows: Tensor
    context: int
    key: str
    statistics: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class MixResults:
    """Results of a task, in its order, and the largest memory of its process so far."""

    results: list[MixResult]
    peak_rss_bytes: int


# Of this process's last inputs: Ray runs the next task in the same process.
_LAST: dict[str, MixMeasurement] = {}


def measure_mixes(
    inputs: MixInputs,
    tasks: Sequence[Sequence[MixOnText]],
    workers: int,
    needs: ActorResources,
    done: Callable[[int, MixResults], None],
) -> None:
    """Run tasks, `workers` of them at a time; done(number, results) is called as each ends. Inside a Ray session.

    A task whose process or node is lost is run again.
    """
    batches = Batches("mixtures at once", 1, "use a smaller context, fewer sequences, or fewer workers")

    def arguments(number: int) -> tuple[object, ...]:
        return inputs, tasks[number], int(needs.cpus)

    for number, results in task_results(_measure, arguments, len(tasks), min(workers, len(tasks)), needs, batches):
        done(number, results)


def _measure(inputs: MixInputs, work: Sequence[MixOnText], threads: int) -> MixResults:
    torch.set_num_threads(max(1, threads))
    if inputs.key not in _LAST:
        _LAST.clear()
        statistics = {name: read_layers(file) for name, file in inputs.statistics.items()}
        _LAST[inputs.key] = MixMeasurement(load_model(inputs), inputs.windows, inputs.context, statistics)
    measurement = _LAST[inputs.key]
    return MixResults([measurement.measure(mix, number) for mix, number in work], peak_rss_bytes())
