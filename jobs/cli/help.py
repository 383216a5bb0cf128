"""Texts of `hasten --help` and `hasten JOB --help`, made without heavy imports."""

import ast
import shutil
import textwrap
from pathlib import Path

from hasten.jobs.cli.methods import families, heading, job_file, method, method_names
from hasten.jobs.cli.options import Option, options
from hasten.jobs.common.records import Record
from hasten.jobs.descriptors.descriptor import Job, Variants
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.sweep.options import PREFIX, SweepConfig

_INDENT = "  "
_COMMANDS = Path(__file__).parent / "commands"


def command_names() -> list[str]:
    """Commands besides the jobs: the files of jobs/cli/commands."""
    return sorted(path.stem for path in _COMMANDS.glob("*.py") if not path.stem.startswith("_"))


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
    for job in jobs().values():
        lines += _row(f"{job.name} NAME" if job.variants else job.name, job.summary.removesuffix("."))
    lines += ["", "commands:"]
    for name in command_names():
        lines += _row(name, _command_summary(name))
    for family in families():
        lines += ["", f"{heading(family)}:", *_methods(family)]
    for variants in [job.variants for job in jobs().values() if job.variants]:
        lines += ["", f"{variants.kind}s:", *_variants(variants)]
    lines += [
        "",
        "hasten JOB --help lists the options of a job, hasten COMMAND --help those of a command.",
        "With --multirun options may have several values (bits=2,3,4), and the job runs for each on the whole cluster.",
        "Without options every job runs on the models that come with the package. hasten --version prints the version.",
    ]
    return "\n".join(lines)


def job_help(job: Job) -> str:
    """Text of `hasten JOB --help`, of a job or one of its variants."""
    variants = None if job.variant else job.variants
    command = " ".join(["hasten", *job.words, *(["NAME"] if variants else [])])
    lines = [f"usage: {command} [--multirun] [key=value …]", "", *_wrap(job.summary, "")]
    if variants:
        lines += ["", f"{variants.kind}s (NAME):", *_variants(variants)]
    lines += ["", "options, with their defaults:"]
    chosen = _flat(job_file(job.name))
    groups = []
    lists = {item.methods for item in options(job.options) if item.methods}
    for item in options(job.options):
        if item.group or item.methods:
            groups.append(item.methods or item.key)
        lines += _option(item, chosen.get(item.key, item.default))
    for group in groups:
        lines += ["", f"{heading(group)}:", *_methods(group, with_fields=True, listed=group in lists)]
    lines += [
        "",
        "options of a sweep, with --multirun, where values may be 2,3,4, range(2,5), choice(a,b) or interval(0,1):",
    ]
    for item in options(SweepConfig, PREFIX):
        lines += _option(item, item.default)
    if job.examples:
        lines += ["", "examples:", *(_INDENT + line for line in job.examples)]
    return "\n".join(lines)


def _command_summary(name: str) -> str:
    tree = ast.parse((_COMMANDS / f"{name}.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split()).removesuffix(".")


def _variants(variants: Variants) -> list[str]:
    return [line for name in variants.names() for line in _row(name, variants.summary(name))]


def _methods(group: str, with_fields: bool = False, listed: bool = False) -> list[str]:
    """Rows of a family's methods. listed: whether an option lists several of them, see schema.method_list."""
    lines = []
    for name in method_names(group):
        entry = method(group, name)
        lines += _row(name, entry.summary)
        if with_fields and entry.fields:
            start = f"{group}.{name}" if listed else group
            words = ", ".join(f"{start}.{item.name}={_shown(item.default)}" for item in entry.fields)
            lines += _wrap(words, _INDENT * 3)
    return lines


def _option(item: Option, default: object) -> list[str]:
    rules = [f"{'some' if item.methods else 'one'} of {', '.join(item.choices)}"] if item.choices else []
    if item.at_least is not None and item.at_most is not None:
        rules.append(f"{item.at_least:g} to {item.at_most:g}")
    text = item.help + (f" ({'; '.join(rules)})" if rules else "")
    return _row(f"{item.key}={_shown(default)}", text, 34)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(item) for item in value)}]"
    return str(value)


def _flat(tree: Record, prefix: str = "") -> Record:
    """Values of a job's file by flat key, and the methods that it chooses by their group's name."""
    values: Record = {}
    for key, value in tree.items():
        if key == "defaults" and not prefix:
            for entry in value:
                values |= entry if isinstance(entry, dict) else {}
        elif isinstance(value, dict):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _row(term: str, text: str, width: int = 20) -> list[str]:
    """Lines with a term on the left and its text wrapped in a column on the right."""
    lines = _wrap(text, " " * (len(_INDENT) + width))
    if len(term) < width:
        lines[0] = f"{_INDENT}{term:<{width}}{lines[0].lstrip()}"
        return lines
    return [_INDENT + term, *lines]


def _wrap(text: str, indent: str) -> list[str]:
    columns = min(120, max(72, shutil.get_terminal_size((110, 24)).columns))
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [indent]
