"""The tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a checkpoint folder, None where the folder has none (token ids may come from a .npy)."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(folder)
