"""The tokenizer of a checkpoint, and the size of its model's vocabulary."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hasten.accel.data.chat import use_template

Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(folder: Path, template: str | None = None) -> Tokenizer | None:
    """transformers' tokenizer of a checkpoint folder, None if it has none: token ids may come from a .npy file.

    template: file of a Jinja chat template that replaces the tokenizer's own.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    has_one = any((folder / name).exists() for name in names)
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_one else None
    if template is not None:
        use_template(tokenizer, template)
    return tokenizer


def vocabulary_size(folder: Path) -> int:
    """Rows of the model's embedding, which may exceed the number of the tokenizer's entries."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
