"""Windows of token ids for calibration and evaluation, from the standard library's sources, a file or the hub.

Documents are concatenated to one stream; before each of them stand the tokenizer's separator tokens. Text is read and
tokenized only until there are enough tokens for the windows. A window of sequence_length tokens begins with the tokens
that the tokenizer adds before a text, where it adds any: they count, so that memory and the model's context are what
sequence_length says.
"""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hasten.accel.data.begin import separator_tokens
from hasten.accel.data.documents import (
    LIBRARY,
    Document,
    first_line,
    hub_documents,
    json_documents,
    kind_of,
    library_documents,
    line_ranges,
    parquet_documents,
    read_text,
)
from hasten.accel.data.library import SPLITS
from hasten.accel.data.mixture import components, counts, is_mixture
from hasten.accel.data.packing import pack
from hasten.accel.data.parts import Part, larger_calibrations
from hasten.accel.errors import UserError

# Windows are drawn from this many times the requested tokens, so that they come from many documents.
MARGIN = 4
_DOCUMENTS_AT_ONCE = 32
_BYTES_PER_TOKEN = 8
# Least sizes of a section of a text, see parts: so each part of a section holds several windows of usual lengths.
_SECTION = {"bytes": 160 * 2**10, "tokens": 40 * 2**10, "rows": 10}


@dataclass(frozen=True)
class Reading:
    """What was read of one source.

    weight: its share of the tokens asked for. documents: how many the sequences were drawn from, None for token ids.
    """

    source: str
    weight: float
    sequences: int
    tokens: int
    documents: int | None


@dataclass(frozen=True)
class Sample:
    """Sequences of token ids (N, T), or packed ones (see data/packing.py), and what was read for them."""

    tokens: Tensor
    readings: tuple[Reading, ...]


def load_sample(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    split: str = "train",
    seed: int = 0,
    vocabulary: int | None = None,
    part: Part | None = None,
    begin: tuple[int, ...] = (),
    packed: bool = False,
) -> Sample:
    """Sequences of a source, or of a mixture of sources in an order drawn by seed; see load_tokens.

    packed: sequences of whole documents, see data/packing.py. UserError where the source has no documents.
    """
    _check_sizes(sequences, sequence_length, split, begin)
    if vocabulary is None and tokenizer is not None:
        vocabulary = len(tokenizer)
    parts = components(source)
    tokens, readings = [], []
    for component, count in zip(parts, counts(parts, sequences, source), strict=True):
        name = component.source
        found: np.ndarray | Tensor
        documents: int | None
        if packed:
            found, documents = _pack(name, tokenizer, count, sequence_length, split, seed, part, begin)
        else:
            found, documents = _draw(name, tokenizer, count, sequence_length, split, seed, part, begin)
        tokens.append(_checked(found, name, vocabulary, packed))
        readings.append(Reading(name, component.weight, count, count * sequence_length, documents))
    joined = torch.cat(tokens) if len(tokens) > 1 else tokens[0]
    if len(tokens) > 1:
        # Every part of the sequences is such a mixture, too.
        joined = joined[random.Random(seed).sample(range(sequences), sequences)]
    return Sample(joined, tuple(readings))


def load_tokens(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    split: str = "train",
    seed: int = 0,
    vocabulary: int | None = None,
    part: Part | None = None,
    begin: tuple[int, ...] = (),
) -> Tensor:
    """Token ids (sequences, sequence_length) int64 from the source.

    source: `library` (the standard library's files of that split, in an order drawn by seed), a file of token ids
    (.npy: rows, or one stream) or of text (.txt, .md, .jsonl, .parquet), `hub:NAME[:split[:field]]`, or a mixture of
    these (data/mixture.py).
    tokenizer: a tokenizer of transformers; may be None for .npy.
    split: `train` draws windows by seed and without replacement. `held_out` draws from the library's held-out files;
    of every other source it takes the first windows in order, as is usual for perplexity. Rows of a two-dimensional
    .npy are taken in order in both splits.
    vocabulary: number of token ids; all ids must be below it. None is the tokenizer's size.
    part: windows of this part alone, instead of a split: drawn by seed, or for an evaluation spread evenly over it.
    begin: ids with which every window begins; rows of ids that begin with them already are not changed.
    Raises UserError where the source is missing, broken or too short, or holds ids outside the vocabulary.
    """
    return load_sample(source, tokenizer, sequences, sequence_length, split, seed, vocabulary, part, begin).tokens


def _check_sizes(sequences: int, sequence_length: int, split: str, begin: tuple[int, ...]) -> None:
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of {', '.join(SPLITS)}")
    for name, value in (("sequences", sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if sequence_length <= len(begin):
        raise UserError(f"sequence_length={sequence_length} leaves no token behind the {len(begin)} that begin a text")


def _draw(
    source: str,
    tokenizer: Any,
    sequences: int,
    length: int,
    split: str,
    seed: int,
    part: Part | None,
    begin: tuple[int, ...],
) -> tuple[np.ndarray, int | None]:
    """Windows (sequences, length) of a source, and the number of documents that they were drawn from."""
    if holds_rows(source):
        return _rows(Path(source), sequences, length, seed, part, begin), None
    pool, documents = _pool(source, tokenizer, sequences, length, split, seed, part, begin)
    if len(pool) < sequences:
        raise UserError(_too_short(source, tokenizer, sequences, length, split, part, begin))
    is_drawn = source == LIBRARY or (split == "train" if part is None else part.role != "evaluation")
    if is_drawn:
        # Python's own generator draws the same numbers whatever versions of torch and numpy are installed.
        numbers = random.Random(seed).sample(range(len(pool)), sequences)
    else:
        numbers = [number * len(pool) // sequences for number in range(sequences)]
    return pool.take(numbers), documents


def _pack(
    source: str,
    tokenizer: Any,
    sequences: int,
    length: int,
    split: str,
    seed: int,
    part: Part | None,
    begin: tuple[int, ...],
) -> tuple[Tensor, int]:
    """Packed sequences of a source, and the number of documents that they were drawn from."""
    for wanted in (sequences * length * MARGIN, None):
        documents = [
            document
            for documents, quota in _documents(source, tokenizer, split, seed, part, wanted, length)
            for document in _encode_apart(tokenizer, documents, begin, quota)
        ]
        found = pack(documents, sequences, length, begin, seed)
        if len(found) == sequences:
            return found, len(documents)
    of = "" if part is None else f" for {part.role}"
    raise UserError(
        f"source={source} holds {len(documents)} documents of {sum(map(len, documents))} tokens{of}, which fill "
        f"{len(found)} of the {sequences} sequences of {length} asked for{_remedy(part)}"
    )


def calibration_part(
    source: str,
    tokenizer: Any,
    sequences: int,
    sequence_length: int,
    begin: tuple[int, ...] = (),
    packed: bool = False,
) -> Part:
    """The part of a source that a calibration of this size draws from: half of it, or more where it needs more.

    Depends on no seed and on nothing that search or evaluation ask for. A source that is too short even as a whole is
    all the calibration's. Of a mixture, every source gives the largest part that one of them must.
    """
    if is_mixture(source):
        parts = components(source)
        sizes = counts(parts, sequences, source)
        found = [
            calibration_part(component.source, tokenizer, size, sequence_length, begin, packed)
            for component, size in zip(parts, sizes, strict=True)
        ]
        return max(found, key=lambda part: part.calibration)
    if kind_of(source) in (LIBRARY, "hub"):
        return Part("calibration")
    for tenths in larger_calibrations():
        part = Part("calibration", tenths)
        if packed:
            has = _packs(source, tokenizer, sequences, sequence_length, part, begin)
        elif holds_rows(source):
            has = len(_row_numbers(len(_read_ids(Path(source))), part))
        else:
            has = len(_pool(source, tokenizer, sequences, sequence_length, "train", 0, part, begin, 1)[0])
        if has >= sequences:
            break
    return part


def _packs(source: str, tokenizer: Any, sequences: int, length: int, part: Part, begin: tuple[int, ...]) -> int:
    """Packed sequences that a part has, `sequences` at most."""
    try:
        return len(_pack(source, tokenizer, sequences, length, "train", 0, part, begin)[0])
    except UserError:
        # A source that is wrong in another way is refused when it is read.
        return 0


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of a tensor of token ids and its shape, in hexadecimal."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def holds_rows(source: str) -> bool:
    """Whether the source is a two-dimensional .npy, whose rows are windows already."""
    return not is_mixture(source) and kind_of(source) == ".npy" and _read_ids(Path(source)).ndim == 2


@dataclass(frozen=True)
class StreamWindows:
    """Disjoint windows (W, length) of a stream (N,) in order, each of which begins with `begin`.

    Only those that are taken are made: the stream may be a file that does not fit in memory. starts: places (W,) of
    their first tokens behind `begin`.
    """

    stream: np.ndarray
    starts: np.ndarray
    length: int
    begin: tuple[int, ...]

    @classmethod
    def of(
        cls, streams: Sequence[np.ndarray], length: int, begin: tuple[int, ...] = (), limit: int | None = None
    ) -> Self:
        """Windows of the streams, none of which reaches over the end of one; at most `limit` of each."""
        places = [_starts(stream, length, begin, limit) for stream in streams]
        offsets = itertools.accumulate(map(len, streams), initial=0)
        starts = np.concatenate([np.zeros(0, np.int64), *map(np.add, places, offsets)])
        return cls(_joined(streams), starts, length, begin)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, numbers: Sequence[int]) -> np.ndarray:
        """The windows of these numbers."""
        text = self.stream[self.starts[numbers][:, None] + np.arange(self.length - len(self.begin))]
        if not self.begin:
            return text
        head = np.asarray(self.begin, dtype=np.int64)
        return np.concatenate([np.tile(head, (len(text), 1)), text.astype(np.int64)], 1)


def _starts(stream: np.ndarray, length: int, begin: tuple[int, ...], limit: int | None) -> np.ndarray:
    """Places where the windows' text begins; where the stream itself goes on with `begin`, it is not repeated."""
    size = length - len(begin)
    if not begin:
        return np.arange(len(stream) // size)[:limit] * size
    head = np.asarray(begin, dtype=np.int64)
    starts: list[int] = []
    at = 0
    while limit is None or len(starts) < limit:
        if np.array_equal(stream[at : at + len(head)], head):
            at += len(head)
        if at + size > len(stream):
            break
        starts.append(at)
        at += size
    return np.asarray(starts, dtype=np.int64)


def _joined(streams: Sequence[np.ndarray]) -> np.ndarray:
    """One stream; a single one is not copied."""
    return streams[0] if len(streams) == 1 else np.concatenate([np.zeros(0, np.int64), *streams])


def _pool(
    source: str,
    tokenizer: Any,
    sequences: int,
    length: int,
    split: str,
    seed: int,
    part: Part | None,
    begin: tuple[int, ...],
    margin: int = MARGIN,
) -> tuple[StreamWindows, int | None]:
    """Windows to choose from, fewer than `sequences` where there are no more, and the number of their documents."""
    in_order = part is None and split == "held_out" and source != LIBRARY
    min_tokens = sequences * length * (1 if in_order else margin)
    limit = sequences if in_order else None
    for wanted in (min_tokens, None) if part is not None else (min_tokens,):
        streams, documents = _streams(source, tokenizer, split, seed, part, begin, wanted, length)
        windows = StreamWindows.of(streams, length, begin, limit)
        if len(streams) == 1 or len(windows) >= sequences:
            return windows, documents
    # Ranges shorter than a window, or with much left over behind the last one: windows may reach over their borders.
    return StreamWindows.of([_joined(streams)], length, begin), documents


def _streams(
    source: str,
    tokenizer: Any,
    split: str,
    seed: int,
    part: Part | None,
    begin: tuple[int, ...],
    min_tokens: int | None,
    length: int,
) -> tuple[list[np.ndarray], int | None]:
    """Token ids of every range of the part: min_tokens together where the source has as many; None is all of them.

    Also the number of documents among them; None for a source of token ids.
    """
    kind = kind_of(source)
    if kind == ".npy":
        ids = _read_ids(Path(source))
        ranges = [(0, len(ids))] if part is None else part.ranges(len(ids), _SECTION["tokens"])
        most = len(ids) if part is None or min_tokens is None else _quota(min_tokens, ranges, length)
        return [ids[first : min(stop, first + most)] for first, stop in ranges], None
    _check_tokenizer(source, tokenizer)
    separator = separator_tokens(tokenizer, begin)
    if kind in (".txt", ".md"):
        path = Path(source)
        ranges = _byte_ranges(path, part)
        quota = None if min_tokens is None else _quota(min_tokens, ranges, length if part is not None else 0)
        return [_encode_range(tokenizer, path, first, stop, separator, quota) for first, stop in ranges], 1
    streams, count = [], 0
    for documents, quota in _documents(source, tokenizer, split, seed, part, min_tokens, length):
        stream, read = _encode_some(tokenizer, documents, separator, quota)
        streams.append(stream)
        count += read
    return streams, count


def _documents(
    source: str,
    tokenizer: Any,
    split: str,
    seed: int,
    part: Part | None,
    min_tokens: int | None,
    length: int,
) -> list[tuple[Iterator[Document], int | None]]:
    """Documents of every range of the part, and how many tokens to take of it, None for all; see _streams."""
    kind = kind_of(source)
    if kind in (".npy", ".txt", ".md"):
        raise UserError(
            f"packing=documents: source={source} has no documents: give a .jsonl or .parquet file, hub:NAME or library"
        )
    _check_tokenizer(source, tokenizer)
    if kind == LIBRARY:
        return [(library_documents(split, seed, part), min_tokens)]
    if kind == "hub":
        return [(hub_documents(source, tokenizer, part), min_tokens)]
    path = Path(source)
    if kind == ".parquet":
        return [(parquet_documents(path, tokenizer, part), min_tokens)]
    ranges = _byte_ranges(path, part)
    quota = None if min_tokens is None else _quota(min_tokens, ranges, length if part is not None else 0)
    return [(json_documents(path, tokenizer, first, stop), quota) for first, stop in ranges]


def _byte_ranges(path: Path, part: Part | None) -> list[tuple[int, int]]:
    size = path.stat().st_size
    return [(0, size)] if part is None else line_ranges(path, part.ranges(size, _SECTION["bytes"]))


def _check_tokenizer(source: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise UserError(f"source={source} is text, and the model's folder has no tokenizer; give a .npy of token ids")


def _quota(min_tokens: int, ranges: list[tuple[int, int]], length: int) -> int:
    """Tokens to take of each range; `length` more, since what is left over behind the last window is not used."""
    return -(-min_tokens // max(1, len(ranges))) + length


def _encode_some(
    tokenizer: Any, documents: Iterator[Document], separator: tuple[int, ...], min_tokens: int | None
) -> tuple[np.ndarray, int]:
    """Token ids (N,) of documents, and their number: min_tokens or more, or all of them where there are fewer."""
    streams: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    count = read = 0
    while (min_tokens is None or count < min_tokens) and (
        batch := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE))
    ):
        streams.append(_encode(tokenizer, batch, separator))
        count += len(streams[-1])
        read += len(batch)
    return np.concatenate(streams), read


def _encode_apart(
    tokenizer: Any, documents: Iterator[Document], begin: tuple[int, ...], min_tokens: int | None
) -> Iterator[np.ndarray]:
    """Token ids (N,) of each document, of as many as have min_tokens together; texts begin with `begin`."""
    count = 0
    while min_tokens is None or count < min_tokens:
        document = next(documents, None)
        if document is None:
            return
        encoded = _encode(tokenizer, [document], begin)
        count += len(encoded)
        yield encoded


def _encode(tokenizer: Any, documents: Iterable[Document], separator: tuple[int, ...]) -> np.ndarray:
    """One stream of ids (N,). The separator stands before every text; a conversation is begun by its template."""
    documents = list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    # verbose=False: a document may be longer than the model's context, since it is cut into windows.
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    stream: list[int] = []
    for document in documents:
        stream.extend((*separator, *next(encoded)) if isinstance(document, str) else document)
    return np.asarray(stream, dtype=np.int64)


def _encode_range(
    tokenizer: Any, path: Path, first: int, stop: int, separator: tuple[int, ...], min_tokens: int | None
) -> np.ndarray:
    """Token ids of the beginning of a range of a text file, min_tokens or more; the rest of a long one is not read."""
    size = stop - first if min_tokens is None else min_tokens * _BYTES_PER_TOKEN
    # The rest of a document does not begin one.
    separator = () if first else separator
    while True:
        text = read_text(path, first, min(stop, first + size))
        stream = _encode(tokenizer, [text] if text else [], separator)
        # Reading may have stopped inside a word, so the last tokens should not be needed.
        if first + size >= stop or (min_tokens is not None and len(stream) >= min_tokens + 64):
            return stream
        size *= 2


def _rows(path: Path, sequences: int, length: int, seed: int, part: Part | None, begin: tuple[int, ...]) -> np.ndarray:
    """Rows (sequences, length) of a two-dimensional .npy in the file's order, cut to the length behind `begin`.

    Of a part they are drawn by seed, or for an evaluation spread evenly over it; otherwise the first ones.
    """
    ids = _read_ids(path)
    rows, columns = ids.shape
    numbers = list(range(rows)) if part is None else _row_numbers(rows, part)
    if len(numbers) < sequences or columns < length:
        of = "" if part is None else f", of which {len(numbers)} are for {part.role}"
        raise UserError(
            f"source={path} holds {rows} sequences of {columns} tokens{of}, "
            f"fewer than the {sequences} of {length} asked for{_remedy(part)}"
        )
    if part is None:
        numbers = numbers[:sequences]
    elif part.role == "evaluation":
        numbers = [numbers[number * len(numbers) // sequences] for number in range(sequences)]
    else:
        numbers = sorted(random.Random(seed).sample(numbers, sequences))
    # A slice is not copied where it is all rows.
    chosen = ids[numbers, :length] if numbers != list(range(sequences)) else ids[:sequences, :length]
    if not begin:
        return chosen
    head = np.broadcast_to(np.asarray(begin, dtype=np.int64), (sequences, len(begin)))
    begun = (chosen[:, : len(begin)] == head).all(1, keepdims=True)
    return np.where(begun, chosen, np.concatenate([head, chosen[:, : length - len(begin)].astype(np.int64)], 1))


def _row_numbers(rows: int, part: Part) -> list[int]:
    return [number for first, stop in part.ranges(rows, _SECTION["rows"]) for number in range(first, stop)]


def _too_short(
    source: str,
    tokenizer: Any,
    sequences: int,
    length: int,
    split: str,
    part: Part | None,
    begin: tuple[int, ...],
) -> str:
    """What the source has and what it would need, in tokens."""

    def tokens(of: Part | None) -> int:
        return sum(map(len, _streams(source, tokenizer, split, 0, of, begin, None, length)[0]))

    # A data set of the hub is not read to its end for a message.
    is_divided = part is not None and kind_of(source) not in (LIBRARY, "hub")
    has = f"{tokens(None)} tokens, of which {tokens(part)} are" if is_divided else f"{tokens(part)} tokens"
    of = "" if part is None else f" for {part.role}"
    return (
        f"source={source} holds {has}{of}, fewer than the {sequences * length} asked for "
        f"({sequences} sequences of {length}){_remedy(part)}"
    )


def _remedy(part: Part | None) -> str:
    if part is None:
        return ""
    option = f"{part.role}.source"
    return ": give a longer text or fewer sequences" + ("" if part.role == "calibration" else f", or {option}=OTHER")


def _checked(windows: np.ndarray | Tensor, source: str, vocabulary: int | None, packed: bool) -> Tensor:
    """The windows as int64; UserError names a token id outside the vocabulary."""
    ids = windows[:, 0] if packed else windows
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise UserError(
            f"source={source} holds token id {wrong}, outside the model's vocabulary"
            + (f" of {vocabulary} (0 to {vocabulary - 1})" if vocabulary is not None else "")
        )
    return windows if isinstance(windows, Tensor) else torch.from_numpy(windows.astype(np.int64))


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"source={path} cannot be read as a .npy file: {first_line(error)}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"source={path} holds {ids.dtype}; token ids must be integers")
    if ids.ndim not in (1, 2):
        raise UserError(f"source={path} has shape {ids.shape}; token ids must be (sequences, length) or one stream")
    return ids
