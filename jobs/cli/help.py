"""What `hasten --help` and `hasten JOB --help` print; nothing heavy is imported for it."""

import ast
import shutil
import textwrap
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.jobs.cli.methods import job_file, method, method_names
from hasten.jobs.cli.options import Option, options
from hasten.jobs.common.schema import JOBS, Run, SweepConfig

EXAMPLES = {
    "compress": (
        "hasten compress",
        "hasten compress model=/models/llama quantizer=gptq bits=3 output=/models/llama-w3 workers=8",
        "hasten compress quantizer=round_to_nearest bits=8 group_size=-1 symmetric=true",
        "hasten compress quantizer.act_order=none ignore='[.*down_proj]' calibration.source=text.jsonl",
        "hasten compress --multirun bits=2,3,4 'quantizer=glob(*)' group_size=64,128",
        "hasten compress --multirun bits=3,4 'quantizer.damping=tag(log,interval(0.001,0.1))' sweep.trials=30",
    ),
    "levels": (
        "hasten levels",
        "hasten levels model=/models/llama bits=[2,3,4,5,6,8] output=/models/llama-levels workers=8",
        "hasten levels bits=[] sparsities=[0.25,0.5,0.75] pruner=wanda",
        "hasten levels bits=[3,4] column_bits=[2.5,3]",
    ),
    "search": (
        "hasten search budget=3.2",
        "hasten search model=/models/llama levels=/models/llama-levels budget=3.2 output=/models/llama-3.2 workers=8",
        "hasten search budget=[2.5,3,4] allocator=exact compare=[uniform,baq]",
        "hasten search budget=4 sparsities=[0.5,0.75] drop=[block]",
    ),
    "evaluate": (
        "hasten evaluate",
        "hasten evaluate model=/models/llama-w3 original=/models/llama evaluation.stride=256",
        "hasten evaluate model=/models/llama-w3 tasks=[arc_easy,hellaswag]",
    ),
    "decode": (
        "hasten decode",
        "hasten decode target=/models/llama draft=/models/llama-small drafter=draft_model prompts=prompts.jsonl "
        "output=completions.jsonl",
        "hasten decode prompts=gsm8k.jsonl prompt_field=question temperature=0.8 top_p=0.95 workers=8",
        "hasten decode draft_tokens=0 stream=true",
    ),
    "replay": (
        "hasten replay",
        "hasten replay drafter=token_recycling recorded=completions.jsonl budgets=[16,64]",
        "hasten replay text=text.jsonl target=/models/llama drafter=prompt_lookup",
    ),
    "pretrain": ("hasten pretrain", "hasten pretrain models=[draft] output=/models/mine workers=8"),
    "train_drafter": (
        "hasten train_drafter",
        "hasten train_drafter target=/models/llama draft=/models/llama-1b text.source=text.jsonl text.sequences=2048",
        "hasten train_drafter head=acceptance head.blocks=4",
    ),
    "bench": ("hasten bench compress",),
}
_INDENT = "  "
_HERE = Path(__file__).parent
_FOLDERS = {"benchmarks": _HERE.parent / "bench", "commands": _HERE / "commands"}


def benchmark_names() -> list[str]:
    """Names that `hasten bench NAME` accepts: the files of jobs/benchmarks."""
    return _files("benchmarks")


def command_names() -> list[str]:
    """Commands beside the jobs: the files of jobs/commands."""
    return _files("commands")


@cache
def benchmark_schema(name: str) -> type[Run]:
    """Options of a benchmark: the class `Config` of its file, or the common ones."""
    return getattr(import_module(f"hasten.jobs.bench.{name}"), "Config", JOBS["bench"])


def overview() -> str:
    """Text of `hasten --help`."""
    lines = [
        "usage: hasten JOB [--multirun] [key=value …]",
        "       hasten COMMAND …",
        "",
        "Makes large language models cheaper to run.",
        "",
        "jobs:",
    ]
    for job, schema in JOBS.items():
        lines += _row("bench NAME" if job == "bench" else job, _summary(schema))
    lines += ["", "commands:"]
    for name in command_names():
        lines += _row(name, _docstring_summary("commands", name))
    families = ("quantizer", "column_quantizer", "pruner", "allocator", "drafter", "verifier", "draft_length", "head")
    for family in families:
        lines += ["", f"{family.replace('_', ' ')}s:", *_methods(family)]
    lines += ["", "benchmarks:", *_benchmarks()]
    lines += [
        "",
        "hasten JOB --help lists the options of a job, hasten COMMAND --help those of a command.",
        "With --multirun options may have several values (bits=2,3,4): the job runs for each, on the whole cluster.",
        "Without options every job runs on the models that come with the package. hasten --version prints the version.",
    ]
    return "\n".join(lines)


def job_help(job: str, name: str | None = None) -> str:
    """Text of `hasten JOB --help`, or of `hasten bench NAME --help`."""
    schema = benchmark_schema(name) if name else JOBS[job]
    command = f"hasten {job}" + (f" {name or 'NAME'}" if job == "bench" else "")
    summary = _docstring_summary("benchmarks", name) + "." if name else " ".join((schema.__doc__ or "").split())
    lines = [f"usage: {command} [--multirun] [key=value …]", "", *_wrap(summary, "")]
    if job == "bench" and not name:
        lines += ["", "benchmarks (NAME):", *_benchmarks()]
    lines += ["", "options, with their defaults:"]
    chosen = _flat(job_file(job))
    groups = []
    for item in options(schema):
        if item.group:
            groups.append(item.key)
        lines += _option(item, chosen.get(item.key, item.default))
    for group in groups:
        lines += ["", f"{group}s:", *_methods(group, with_fields=True)]
    lines += [
        "",
        "of a sweep, with --multirun, where options may be bits=2,3,4, range(2,5), choice(a,b) or interval(0,1):",
    ]
    for item in options(SweepConfig, "sweep."):
        lines += _option(item, item.default)
    examples = () if name else EXAMPLES.get(job, ())
    if examples:
        lines += ["", "examples:", *(_INDENT + line for line in examples)]
    return "\n".join(lines)


def _summary(schema: type[Run]) -> str:
    return " ".join((schema.__doc__ or "").split()).removesuffix(".")


def _files(folder: str) -> list[str]:
    found = (_FOLDERS[folder]).glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def _docstring_summary(folder: str, name: str) -> str:
    tree = ast.parse((_FOLDERS[folder] / f"{name}.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split()).removesuffix(".")


def _benchmarks() -> list[str]:
    return [line for name in benchmark_names() for line in _row(name, _docstring_summary("benchmarks", name))]


def _methods(group: str, with_fields: bool = False) -> list[str]:
    lines = []
    for name in method_names(group):
        found = method(group, name)
        lines += _row(name, found.summary)
        if with_fields and found.fields:
            words = ", ".join(f"{group}.{item.name}={_shown(item.default)}" for item in found.fields)
            lines += _wrap(words, _INDENT * 3)
    return lines


def _option(item: Option, default: Any) -> list[str]:
    rules = [f"one of {', '.join(item.choices)}"] if item.choices else []
    if item.at_least is not None and item.at_most is not None:
        rules.append(f"{item.at_least:g} to {item.at_most:g}")
    text = item.help + (f" ({'; '.join(rules)})" if rules else "")
    return _row(f"{item.key}={_shown(default)}", text, 34)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(item) for item in value)}]"
    return str(value)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a job's file by flat key; what it chooses in a group under the group's name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "defaults" and not prefix:
            for entry in value:
                found |= entry if isinstance(entry, dict) else {}
        elif isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _row(left: str, right: str, width: int = 20) -> list[str]:
    """A term and its text, the text in a column of its own and wrapped there."""
    lines = _wrap(right, " " * (len(_INDENT) + width))
    if len(left) < width:
        lines[0] = f"{_INDENT}{left:<{width}}{lines[0].lstrip()}"
        return lines
    return [_INDENT + left, *lines]


def _wrap(text: str, indent: str) -> list[str]:
    columns = min(120, max(72, shutil.get_terminal_size((110, 24)).columns))
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [indent]
