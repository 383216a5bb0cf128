"""The tokenizer of a checkpoint, and the size of its model's vocabulary."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """transformers' tokenizer of a checkpoint folder, None if it has none: token ids may come from a .npy file."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(folder)


def vocabulary_size(folder: Path) -> int:
    """Rows of the model's embedding, which may exceed the number of the tokenizer's entries."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
