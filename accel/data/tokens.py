"""Windows of token ids for calibration and evaluation, from the standard library's sources, a file or the hub.

Documents are concatenated to one stream. Before each of them stands the tokenizer's begin-of-text token, or its
end-of-text token where it has no other. Text is read and tokenized only until there are enough tokens for the windows.
Records of .jsonl files and of the hub may be conversations, which pass through the tokenizer's chat template; such a
document keeps the token that the template begins it with, and gets no second one.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hasten.accel.data.chat import encode_record
from hasten.accel.data.library import SPLITS, library_files, library_root, read_texts
from hasten.accel.errors import UserError

LIBRARY = "library"
SOURCES = "library, a .npy, .txt, .md or .jsonl file, or hub:NAME[:split[:field]]"
# Windows are drawn from this many times the requested tokens, so that they come from many documents.
MARGIN = 4
# Text, or the token ids of a conversation.
Document: TypeAlias = str | list[int]
_DOCUMENTS_AT_ONCE = 32
_CHARACTERS_PER_TOKEN = 8


def load_tokens(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    split: str = "train",
    seed: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Token ids (sequences, sequence_length) int64 from the source.

    source: `library` (the standard library's files of that split, in an order drawn by seed), a file of token ids
    (.npy: rows, or one stream) or of text (.txt, .md, .jsonl), or `hub:NAME[:split[:field]]`.
    tokenizer: a tokenizer of transformers; may be None for .npy.
    split: `train` draws windows by seed and without replacement. `held_out` draws from the library's held-out files;
    of every other source it takes the first windows in order, as is usual for perplexity. Rows of a two-dimensional
    .npy are taken in order in both splits.
    vocabulary: number of token ids; all ids must be below it. None is the tokenizer's size.
    Raises UserError where the source is missing, broken or too short, or holds ids outside the vocabulary.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of {', '.join(SPLITS)}")
    for name, value in (("sequences", sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if vocabulary is None and tokenizer is not None:
        vocabulary = len(tokenizer)
    if _kind(source) == ".npy":
        ids = _read_ids(Path(source))
        if ids.ndim == 2:
            rows = _first_rows(ids, source, sequences, sequence_length)
            return _checked(rows, source, vocabulary)
        stream = ids
    else:
        if tokenizer is None:
            raise UserError(
                f"source={source} is text, and the model's folder has no tokenizer; give a .npy of token ids"
            )
        is_drawn = split == "train" or source == LIBRARY
        min_tokens = sequences * sequence_length * (MARGIN if is_drawn else 1)
        stream = _stream(source, tokenizer, split, seed, min_tokens)
    return _checked(_windows(stream, source, sequences, sequence_length, split, seed), source, vocabulary)


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of a tensor of token ids and its shape, in hexadecimal."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def holds_rows(source: str) -> bool:
    """Whether the source is a two-dimensional .npy, whose rows are windows already."""
    return _kind(source) == ".npy" and _read_ids(Path(source)).ndim == 2


def _kind(source: str) -> str:
    """`library`, `hub` or the suffix of an existing file."""
    if source == LIBRARY:
        return LIBRARY
    if source.startswith("hub:"):
        return "hub"
    path = Path(source)
    if path.suffix not in (".npy", ".txt", ".md", ".jsonl"):
        raise UserError(f"source={source} is none of {SOURCES}")
    if not path.is_file():
        raise UserError(f"source={source}: no such file; give {SOURCES}")
    return path.suffix


def _windows(stream: np.ndarray, source: str, sequences: int, length: int, split: str, seed: int) -> np.ndarray:
    """Disjoint windows (sequences, length) of a stream: drawn by seed, or the first ones in order."""
    if len(stream) < sequences * length:
        raise UserError(
            f"source={source} holds {len(stream)} tokens, fewer than the {sequences * length} asked for "
            f"({sequences} sequences of {length})"
        )
    windows = stream[: len(stream) // length * length].reshape(-1, length)
    if split == "held_out" and source != LIBRARY:
        return windows[:sequences]
    # Python's own generator draws the same numbers whatever versions of torch and numpy are installed.
    return windows[random.Random(seed).sample(range(len(windows)), sequences)]


def _checked(windows: np.ndarray, source: str, vocabulary: int | None) -> Tensor:
    """The windows as int64; UserError names a token id outside the vocabulary."""
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise UserError(
            f"source={source} holds token id {wrong}, outside the model's vocabulary"
            + (f" of {vocabulary} (0 to {vocabulary - 1})" if vocabulary is not None else "")
        )
    return torch.from_numpy(windows.astype(np.int64))


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"source={path} cannot be read as a .npy file: {_first_line(error)}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"source={path} holds {ids.dtype}; token ids must be integers")
    if ids.ndim not in (1, 2):
        raise UserError(f"source={path} has shape {ids.shape}; token ids must be (sequences, length) or one stream")
    return ids


def _first_rows(ids: np.ndarray, source: str, sequences: int, length: int) -> np.ndarray:
    rows, columns = ids.shape
    if rows < sequences or columns < length:
        raise UserError(
            f"source={source} holds {rows} sequences of {columns} tokens, "
            f"fewer than the {sequences} of {length} asked for"
        )
    return ids[:sequences, :length]


def _stream(source: str, tokenizer: Any, split: str, seed: int, min_tokens: int) -> np.ndarray:
    """Token ids of the source's text: min_tokens or more, or all of them where the source has fewer."""
    kind = _kind(source)
    if kind in (".txt", ".md"):
        return _text_stream(Path(source), tokenizer, min_tokens)
    if kind == LIBRARY:
        documents: Iterator[Document] = _library_documents(split, seed)
    elif kind == "hub":
        documents = _hub_documents(source, tokenizer)
    else:
        documents = _json_documents(Path(source), tokenizer)
    parts: list[np.ndarray] = []
    count = 0
    while count < min_tokens and (batch := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE))):
        parts.append(_encode(tokenizer, batch))
        count += len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _encode(tokenizer: Any, documents: Iterable[Document]) -> np.ndarray:
    """One stream of ids (N,): before every document stands the token that begins a text, if the tokenizer has one."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    stream: list[int] = []
    documents = list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    # verbose=False: a document may be longer than the model's context, since it is cut into windows.
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    for document in documents:
        ids = next(encoded) if isinstance(document, str) else document
        if begin is not None and (isinstance(document, str) or document[0] != begin):
            stream.append(begin)
        stream.extend(ids)
    return np.asarray(stream, dtype=np.int64)


def _library_documents(split: str, seed: int) -> Iterator[Document]:
    names = library_files(split)
    random.Random(seed).shuffle(names)
    yield from read_texts(library_root(), names)


def _text_stream(path: Path, tokenizer: Any, min_tokens: int) -> np.ndarray:
    """Token ids of the beginning of a file, min_tokens or more; the rest of a large file is not read."""
    characters = min_tokens * _CHARACTERS_PER_TOKEN
    while True:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                text = file.read(characters)
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"source={path} cannot be read as UTF-8 text: {_first_line(error)}") from error
        stream = _encode(tokenizer, [text]) if text else np.zeros(0, dtype=np.int64)
        # Reading may have stopped inside a word, so the last 64 tokens are not used.
        if len(text) < characters or len(stream) >= min_tokens + 64:
            return stream
        characters *= 2


def _json_documents(path: Path, tokenizer: Any) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not UTF-8, or not JSON
                raise UserError(f"source={path} line {number} is not valid JSON: {_first_line(error)}") from error
            if not isinstance(record, dict):
                raise UserError(
                    f"source={path} line {number} must be an object with a field `text` or other text fields"
                )
            document = encode_record(tokenizer, record, f"source={path} line {number}")
            if document:
                yield document


def _hub_documents(source: str, tokenizer: Any) -> Iterator[Document]:
    """Texts of a data set hub:NAME[:split[:field]]; in a NAME of three parts, the last is the configuration."""
    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"source={source} must be hub:NAME[:split[:field]]")
    name, split, field = [*parts, "", ""][:3]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source={source} needs a package that is not installed: pip install datasets") from error
    owner_and_name, configuration = name, None
    if name.count("/") == 2:
        owner_and_name, configuration = name.rsplit("/", 1)
    try:
        # Streamed, because only the first part of a large data set is needed.
        rows = datasets.load_dataset(owner_and_name, configuration, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            document = encode_record(tokenizer, row, f"source={source} record {number}", field or None)
            if document:
                yield document
    except UserError:
        raise
    except Exception as error:  # `datasets` raises its own errors, and those of the network and of file formats
        raise UserError(f"source={source} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
