"""The descriptor of `hasten bench NAME`, and one for every benchmark, which is a file of this folder."""

import ast
import dataclasses
from functools import cache
from importlib import import_module
from pathlib import Path

from hasten.jobs.bench.options import BenchConfig
from hasten.jobs.common.schema import Run
from hasten.jobs.descriptors.descriptor import Job, Needs, Variants

_FOLDER = Path(__file__).parent
_NO_BENCHMARKS = ("job", "options")


def needs(config: BenchConfig) -> Needs:
    """Resources of a benchmark's own process; the jobs that it measures run beside it."""
    return Needs(float(getattr(config, "threads", 1)), 0.0, getattr(config, "threads", 1))


def names() -> list[str]:
    """Names that `hasten bench NAME` accepts, in order."""
    stems = sorted(path.stem for path in _FOLDER.glob("*.py"))
    return [name for name in stems if not name.startswith("_") and name not in _NO_BENCHMARKS]


def summary(name: str) -> str:
    """First sentence of a benchmark's file, without its full stop."""
    tree = ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split()).removesuffix(".")


@cache
def find(name: str) -> Job:
    """Descriptor of one benchmark; its options are the class `Config` of its file, else BenchConfig."""
    module = f"hasten.jobs.bench.{name}"
    options: type[Run] = getattr(import_module(module), "Config", BenchConfig)
    return dataclasses.replace(JOB, variant=name, options=options, run=f"{module}:run", examples=())


JOB = Job(
    name="bench",
    position=90,
    options=BenchConfig,
    needs="hasten.jobs.bench.job:needs",
    not_planned="a benchmark measures other jobs, which have plans of their own",
    in_ray=False,
    examples=("hasten bench compress",),
    shares_state=True,
    variants=Variants("benchmark", names, summary, find),
)
