"""Parts of the documentation that are generated from the code: the methods, their counts, and the jobs' options.

`python docs/generate.py` writes docs/methods.md and the table of families in README.md from conf; `--check` only
compares. MkDocs loads this file as a hook, which replaces `<!-- options: JOB -->` by a table of the job's options.
"""

import ast
import re
import sys
from pathlib import Path

from hasten.jobs.cli.methods import CONF, families, method, method_names, target_of
from hasten.jobs.cli.options import Option, options
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.sweep.options import SweepConfig

PAGE = Path(__file__).parent / "methods.md"
README = Path(__file__).parents[1] / "README.md"
TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- /families -->)", re.DOTALL)
MARKER = re.compile(r"<!-- options: (\w+) -->")
# Titles of families; a family that is not listed has its own name as title.
TITLES = {
    "quantizer": "Quantizers",
    "column_quantizer": "Column quantizers",
    "pruner": "Pruners",
    "transform": "Block transforms",
    "level": "Level kinds",
    "allocator": "Allocators and searchers",
    "fitness": "Fitness of a candidate",
    "hardware": "Hardware of a budget of time",
    "drafter": "Drafters",
    "verifier": "Verifiers",
    "draft_length": "Draft lengths",
    "head": "Trained heads",
    "cache": "KV caches",
}
# Groups of settings that are chosen by name, and are no methods.
NO_METHODS = ("hardware",)


def methods_page() -> str:
    """Markdown of docs/methods.md."""
    groups = families()
    lists = {item.methods for job in jobs().values() for item in options(job.options) if item.methods}
    of_methods = [group for group in groups if group not in NO_METHODS]
    total = sum(len(method_names(group)) for group in of_methods)
    lines = [
        "# Methods",
        "",
        f"{total} methods in {len(of_methods)} families. "
        "This page is generated from `conf/` by `python docs/generate.py`.",
        "Each method is one file; its hyper-parameters are set as `FAMILY.NAME=VALUE`.",
    ]
    for group in groups:
        chosen = f"`{group}s=[NAME,…]`, `{group}.NAME.FIELD=VALUE`" if group in lists else f"`{group}=NAME`"
        lines += ["", f"## {TITLES.get(group, group)}", "", chosen, ""]
        lines += ["| name | method | source | hyper-parameters |", "| --- | --- | --- | --- |"]
        for name in method_names(group):
            entry = method(group, name)
            fields = ", ".join(f"`{item.name}={_shown(item.default)}`" for item in entry.fields)
            lines.append(f"| `{name}` | {_cell(entry.summary)} | {_cell(_source(group, name))} | {_cell(fields)} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with the table of families from conf."""
    rows = ["| family | methods | names |", "| --- | --: | --- |"]
    for group in families():
        names = method_names(group)
        rows.append(f"| {TITLES.get(group, group)} | {len(names)} | {', '.join(f'`{name}`' for name in names)} |")
    return TABLE.sub("\n".join(["", *rows, ""]) + "\n", README.read_text(encoding="utf-8"))


def options_table(rows: list[Option]) -> str:
    """Markdown table of options with their defaults."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for item in rows:
        text = item.help or "chosen by name, see [methods](../methods.md)"
        accepted = f" ({item.expected})" if item.choices and not item.group else ""
        lines.append(f"| `{item.key}` | `{_shown(item.default)}` | {_cell(text + accepted)} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Hook of MkDocs: the page with tables of options in place of markers."""
    return MARKER.sub(lambda match: options_table(_options(match[1])), markdown)


def _options(name: str) -> list[Option]:
    return options(SweepConfig, "sweep.") if name == "sweep" else options(jobs()[name].options)


def _source(group: str, name: str) -> str:
    """First sentence after `Source:` in a method's module."""
    path = CONF.parent.joinpath(*target_of(group, name).split(".")[1:-1]).with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    # "et al." does not end the sentence.
    match = re.search(r"Source: (.+?)(?:(?<!et al)\.(?=\s|$)|$)", " ".join(docstring.split()))
    return match[1] if match else "–"


def _shown(value: object) -> str:
    if value is None or value == {}:
        return "null" if value is None else "see conf"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(item) for item in value)}]"
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(words: list[str]) -> int:
    """Write both files; with --check print those that differ from conf and return 1 if there are any."""
    pages = {PAGE: methods_page(), README: readme()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in words:
        for path in stale:
            print(f"{path.name} does not match conf: run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
