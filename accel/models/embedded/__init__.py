"""The small trained models that ship with the package: a target, a draft, and the target fine-tuned for recall.

They share one tokenizer.
"""

from pathlib import Path

NAMES = ("target", "draft", "recall")


def path(name: str) -> Path:
    """Folder of an embedded transformers checkpoint, one of NAMES."""
    if name not in NAMES:
        raise ValueError(f"embedded model {name!r} is none of {', '.join(NAMES)}")
    return Path(__file__).parent / name


def reference(folder: Path) -> str:
    """Name by which files refer to a checkpoint folder: its path, or `embedded:NAME`, because the package may move."""
    resolved = folder.resolve()
    is_embedded = resolved.parent == Path(__file__).resolve().parent and resolved.name in NAMES
    return f"embedded:{resolved.name}" if is_embedded else str(resolved)


def from_reference(name: str) -> Path:
    """Folder that a name from `reference` refers to; it may no longer exist."""
    kind, _, model = name.partition(":")
    return path(model) if kind == "embedded" and model in NAMES else Path(name)
