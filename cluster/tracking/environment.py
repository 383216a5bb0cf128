"""The environment of a run: commit and diff of the checkout, versions of packages, and the machine."""

import json
from functools import cache
from importlib import metadata
from pathlib import Path

from hasten.cluster.runtime import resources

FILE = "environment.json"
_DIFF_CHARACTERS = 1_000_000


@cache
def environment() -> dict[str, object]:
    """Keys hasten (version), git (commit and diff; None outside a checkout), packages (versions), machine."""
    commit = resources.git_commit()
    diff = (resources.git_diff() or "")[:_DIFF_CHARACTERS] if commit and commit.endswith("-dirty") else ""
    distributions = metadata.distributions()
    packages = {package.metadata["Name"]: package.version for package in distributions if package.metadata["Name"]}
    return {
        "hasten": resources.package_version(),
        "git": {"commit": commit, "diff": diff} if commit else None,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "machine": resources.machine(),
    }


def write_environment(folder: Path, tracking_uri: str) -> Path:
    """Write the environment and the tracking URI to folder/environment.json; returns its path."""
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"tracking_uri": tracking_uri, **environment()}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def tracking_uri(folder: Path) -> str | None:
    """Tracking URI of the run of a folder; None if it is unknown."""
    try:
        return str(json.loads((folder / FILE).read_text(encoding="utf-8"))["tracking_uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
