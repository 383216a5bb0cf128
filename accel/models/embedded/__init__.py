"""The small trained models that ship with the package: a target and a draft that share one tokenizer."""

from pathlib import Path

NAMES = ("target", "draft")


def path(name: str) -> Path:
    """Folder of an embedded transformers checkpoint, `target` or `draft`."""
    if name not in NAMES:
        raise ValueError(f"embedded model {name!r} is none of {', '.join(NAMES)}")
    return Path(__file__).parent / name
