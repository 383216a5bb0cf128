"""The tokenizer of a checkpoint, how it begins a text, and the size of its model's vocabulary."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hasten.accel.data.begin import begin_tokens
from hasten.accel.data.chat import use_template
from hasten.accel.errors import UserError
from hasten.accel.models.skeleton import read_config

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
    return int(read_config(folder).get_text_config().vocab_size)


def begin_of(folder: Path, tokenizer: Tokenizer | None, bos: str) -> tuple[int, ...]:
    """Ids with which every window of text begins.

    bos: `auto` is what the tokenizer adds before a text, nothing without a tokenizer; `true` adds the begin-of-text
    token where the tokenizer adds none; `false` is nothing. UserError for `true` where there is no such token.
    """
    begin = () if tokenizer is None or bos == "false" else begin_tokens(tokenizer)
    if begin or bos != "true":
        return begin
    config = read_config(folder).get_text_config()
    token = getattr(config, "bos_token_id", None) if tokenizer is None else tokenizer.bos_token_id
    if token is None:
        raise UserError(f"bos=true, but {folder} names no token that begins a text: use bos=auto or bos=false")
    return (int(token),)


def tokenizer_fingerprint(tokenizer: Tokenizer | None) -> str | None:
    """SHA-256, in hexadecimal, of what determines the ids of a text; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: object = type(tokenizer).__name__
    if backend is not None:
        # Settings of padding and truncation stay out: they belong to calls.
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    content = json.dumps([rules, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(content.encode()).hexdigest()


def template_fingerprint(tokenizer: Tokenizer | None) -> str | None:
    """SHA-256, in hexadecimal, of the chat template; None where there is none."""
    template = None if tokenizer is None else tokenizer.chat_template
    return None if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
