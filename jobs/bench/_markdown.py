"""Tables for docs/benchmarks.md, in which every benchmark owns one section."""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TITLE = "# Benchmarks\n\nEach section is written by `hasten bench NAME`, which replaces it and leaves the others.\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table; all columns but the first are right-aligned."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def replace_section(document: Path, heading: str, body: str) -> None:
    """Put body under `## heading`: in the place of the section of that name, or at the end; the rest stays."""
    text = document.read_text(encoding="utf-8") if document.exists() else _TITLE
    section = f"## {heading}\n\n{body.strip()}\n"
    parts = re.split(r"(?m)^(?=## )", text)
    owned = [index for index, part in enumerate(parts) if part.partition("\n")[0].rstrip() == f"## {heading}"]
    if owned:
        parts[owned[0]] = section
    else:
        parts.append(section)
    document.parent.mkdir(parents=True, exist_ok=True)
    unfinished = document.with_name(f".{document.name}.{os.getpid()}")
    unfinished.write_text("\n".join(part.strip() + "\n" for part in parts if part.strip()), encoding="utf-8")
    unfinished.replace(document)


def default_document(run_dir: Path) -> Path:
    """docs/benchmarks.md of the checkout that this code runs from; in an installed package, of the run's folder."""
    root = Path(__file__).resolve().parents[2]
    return (root / "docs" if (root / "pyproject.toml").exists() else run_dir) / "benchmarks.md"


def provenance() -> str:
    """Line that names machine, versions, date and commit."""
    from hasten.cluster.runtime import resources

    machine = resources.machine()
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "ray"))
    memory = machine["memory_bytes"] / 2**30
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB, {gpus}; "
        f"Python {machine['python']}, {packages}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; "
        f"commit {resources.git_commit() or 'unknown'}."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
