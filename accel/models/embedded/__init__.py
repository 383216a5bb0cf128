"""The small trained models that ship with the package: a target and a draft that share one tokenizer."""

from pathlib import Path

NAMES = ("target", "draft")


def path(name: str) -> Path:
    """Folder of an embedded transformers checkpoint, `target` or `draft`."""
    if name not in NAMES:
        raise ValueError(f"embedded model {name!r} is none of {', '.join(NAMES)}")
    return Path(__file__).parent / name


def reference(folder: Path) -> str:
    """Name of a checkpoint's folder to be kept in files: its path, or `embedded:NAME`, as the package may move."""
    found = folder.resolve()
    ours = found.parent == Path(__file__).resolve().parent and found.name in NAMES
    return f"embedded:{found.name}" if ours else str(found)


def referred(name: str) -> Path:
    """Folder of what `reference` returned; it may be gone."""
    kind, _, model = name.partition(":")
    return path(model) if kind == "embedded" and model in NAMES else Path(name)
