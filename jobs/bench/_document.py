"""docs/benchmarks.md, in which every benchmark owns one section."""

import logging
import os
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hasten.cluster.runtime import resources

_LOG = logging.getLogger(__name__)
_TITLE = "# Benchmarks\n\nEach section is written by `hasten bench NAME`, which replaces it and leaves the others.\n"


def publish(document: str | None, run_dir: Path, heading: str, body: str) -> None:
    """Print a section and write it to the document; None is docs/benchmarks.md, or a file in run_dir."""
    path = Path(document) if document else default_document(run_dir)
    replace_section(path, heading, body)
    print(body, flush=True)
    _LOG.info("written to %s", path)


def replace_section(document: Path, heading: str, body: str) -> None:
    """Write body under `## heading`, replacing the section of that name or appended; other sections stay."""
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
    """docs/benchmarks.md of the checkout that this code runs from; for an installed package, a file in run_dir."""
    root = Path(__file__).resolve().parents[2]
    return (root / "docs" if (root / "pyproject.toml").exists() else run_dir) / "benchmarks.md"


def provenance() -> str:
    """Line with machine, versions, date and commit."""
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
