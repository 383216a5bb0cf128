"""Time of every kernel, its share of the memory's rate, and torch's own operators beside it.

On a machine without a GPU only the kernels in C are timed; `make gpu` writes the same table where hasten's other
packages are missing.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import publish
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import Run, option, plain

if TYPE_CHECKING:
    from hasten.kernels.benchmark import Results

HEADING = "kernels: time and share of the memory's rate"


@dataclass
class Config(Run):
    """Check each kernel against its torch reference, then time both, and torch's own operators."""

    ops: list[str] = option([], "which ops, the folders of kernels; [] is all")
    seconds: float = option(1200.0, "after this time no further case is begun", at_least=1)
    threads: int = option(1, "threads of CPU kernels", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # torch: `hasten bench kernels --help` must not wait for it.
    import torch

    from hasten.kernels import benchmark

    unknown = next((name for name in config.ops if name not in benchmark.op_names()), None)
    if unknown is not None:
        raise UserError(f"ops={unknown} is none of {', '.join(benchmark.op_names())}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = start(config)
    with tracked(config, "bench kernels", folder) as tracker:
        tracker.params(plain(config))
        torch.set_num_threads(config.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        results = benchmark.run(device, ops=config.ops, seconds=config.seconds)
        publish(config.document, folder, HEADING, benchmark.text(results))
        report = {
            "job": "bench kernels",
            "config": plain(config),
            "metrics": _metrics(results),
            "kernels": asdict(results),
            "output": str(folder),
        }
        return tracker.report(report)


def _metrics(results: "Results") -> dict[str, float]:
    """Numbers of measured, missing and wrong cases; of each op the largest share of the copy rate."""
    kernels = [row for row in results.rows if row.implementation == "kernel"]
    metrics: dict[str, float] = {"cases": len(kernels), "skipped": len(results.skipped), "wrong": len(results.wrong)}
    for row in kernels:
        name = f"{row.op}_copy_share"
        metrics[name] = max(row.copy_share, metrics.get(name, 0.0))
    return metrics
