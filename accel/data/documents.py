"""Documents of a source of text: whole files, byte ranges of files, records of the hub, the library's files.

A document is a text, or the token ids of a conversation, which the chat template begins.
"""

import codecs
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from hasten.accel.data.chat import encode_record
from hasten.accel.data.library import library_files, library_root, read_texts
from hasten.accel.data.parts import Part
from hasten.accel.data.records import check_characters
from hasten.accel.errors import UserError

LIBRARY = "library"
SOURCES = (
    "library, a .npy, .txt, .md, .jsonl or .parquet file, hub:NAME[:split[:field]], or mix:SOURCE:WEIGHT+SOURCE:WEIGHT"
)
Document: TypeAlias = str | list[int]
# The last of so many held-out files of the library, in the order of the evaluation, are those of the search.
_SEARCH_ONE_IN = 3
# Bytes in which a line must end for a text to be cut there; the lines of JSON have no limit.
_LONGEST_LINE = 2**16
_BYTES_AT_ONCE = 2**16
_ROWS_AT_ONCE = 256


def kind_of(source: str) -> str:
    """`library`, `hub` or the suffix of an existing file; UserError for anything else."""
    if source == LIBRARY:
        return LIBRARY
    if source.startswith("hub:"):
        return "hub"
    path = Path(source)
    if path.suffix not in (".npy", ".txt", ".md", ".jsonl", ".parquet"):
        raise UserError(f"source={source} is none of {SOURCES}")
    if not path.is_file():
        raise UserError(f"source={source}: no such file; give {SOURCES}")
    return path.suffix


def library_documents(split: str, seed: int, part: Part | None) -> Iterator[str]:
    """Files of the library in an order drawn by seed; a part for search or evaluation has its own held-out files."""
    if part is None or part.role == "calibration":
        names = library_files("train" if part else split)
        random.Random(seed).shuffle(names)
    else:
        names = library_files("held_out")
        random.Random(0).shuffle(names)
        border = len(names) - len(names) // _SEARCH_ONE_IN
        if part.role == "evaluation":
            names = names[:border]
        else:
            names = sorted(names[border:])
            random.Random(seed).shuffle(names)
    yield from read_texts(library_root(), names)


def json_documents(path: Path, tokenizer: Any, first: int = 0, stop: int | None = None) -> Iterator[Document]:
    """Documents of the lines of a .jsonl file that begin in the bytes [first, stop); None is its end."""
    with path.open("rb") as file:
        file.seek(first)
        at = first
        while (stop is None or at < stop) and (line := file.readline()):
            if line.strip():
                try:
                    document = _json_document(line, tokenizer, "")
                except UserError:
                    # The number of a line is counted for a message only: ranges begin anywhere in a long file.
                    document = _json_document(line, tokenizer, f"source={path} line {_number(path, at)}")
                if document:
                    yield document
            at += len(line)


def _json_document(line: bytes, tokenizer: Any, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{where} is not valid JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object with a field `text` or other text fields")
    check_characters(line.decode("utf-8", "replace"), record, where)
    return encode_record(tokenizer, record, where)


def _number(path: Path, at: int) -> int:
    """Number of the line that begins at byte `at`."""
    with path.open("rb") as file:
        return file.read(at).count(b"\n") + 1


def parquet_documents(path: Path, tokenizer: Any, part: Part | None = None) -> Iterator[Document]:
    """Documents of the rows of a .parquet file, of a part those that it holds."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"source={path} needs a package that is not installed: pip install pyarrow") from error
    index = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    if part is None or part.holds(index):
                        document = encode_record(tokenizer, row, f"source={path} row {index + 1}")
                        if document:
                            yield document
                    index += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"source={path} cannot be read as a .parquet file: {first_line(error)}") from error


def hub_documents(source: str, tokenizer: Any, part: Part | None = None) -> Iterator[Document]:
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
        for index, row in enumerate(rows):
            if part is None or part.holds(index):
                document = encode_record(tokenizer, row, f"source={source} record {index + 1}", field or None)
                if document:
                    yield document
    except UserError:
        raise
    except Exception as error:  # `datasets` raises its own errors, and those of the network and of file formats
        raise UserError(f"source={source} cannot be loaded: {first_line(error)}") from error


def read_text(path: Path, first: int, stop: int) -> str:
    """Text in the bytes [first, stop) of a file, without a character that the range cuts at its end."""
    try:
        with path.open("rb") as file:
            file.seek(first)
            return codecs.getincrementaldecoder("utf-8")().decode(file.read(stop - first), stop >= path.stat().st_size)
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"source={path} cannot be read as UTF-8 text: {first_line(error)}") from error


def line_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte ranges of a file with their borders moved to the next begin of a line; empty ranges are left out.

    Equal borders move to the same place, so that disjoint ranges stay disjoint. Where no line of a text ends near a
    border, it moves to the next character only.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        moved = [(_line_begin(file, first, size, path), _line_begin(file, stop, size, path)) for first, stop in ranges]
    return [(first, stop) for first, stop in moved if first < stop]


def _line_begin(file: Any, at: int, size: int, path: Path) -> int:
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    # A line begins at `at` itself where the byte before it ends one.
    file.seek(at - 1)
    read = b""
    while chunk := file.read(_BYTES_AT_ONCE):
        read += chunk
        if b"\n" in chunk:
            return at + read.index(b"\n")
        if path.suffix != ".jsonl" and len(read) >= _LONGEST_LINE:
            break
    if path.suffix == ".jsonl":
        return size
    # Bytes of this pattern continue a character of UTF-8.
    return at + next((n for n, byte in enumerate(read[1:]) if byte & 0xC0 != 0x80), 0)


def first_line(error: Exception) -> str:
    """First line of an error's message, else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
