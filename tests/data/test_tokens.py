import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hasten.accel.data import documents
from hasten.accel.data.tokens import fingerprint, holds_rows, load_tokens
from hasten.accel.errors import UserError
from tests.data.one_token_a_byte import one_token_a_byte

START = "<|start|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with one token a byte, and one that begins a document."""
    return PreTrainedTokenizerFast(tokenizer_object=one_token_a_byte(), bos_token=START, model_max_length=8)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A library of 100 files of 40 bytes; returns the list of the files that were read."""
    names = [f"{number:03}.py" for number in range(100)]
    for name in names:
        (tmp_path / name).write_text(name[:3] * 13 + ".")
    read: list[str] = []

    class Root:
        def __truediv__(self, name: str) -> Path:
            read.append(name)
            return tmp_path / name

    monkeypatch.setattr(documents, "library_root", Root)
    monkeypatch.setattr(documents, "library_files", lambda split: names[:50] if split == "train" else names[50:])
    return read


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_real_library_gives_windows_that_repeat_from_their_seed(tokenizer: Any) -> None:
    first = load_tokens("library", tokenizer, 6, 32, seed=1)
    assert first.shape == (6, 32)
    assert first.dtype == torch.int64
    assert torch.equal(first, load_tokens("library", tokenizer, 6, 32, seed=1))
    assert not torch.equal(first, load_tokens("library", tokenizer, 6, 32, seed=2))


def test_library_windows_come_from_files_of_their_split_alone(tokenizer: Any, library: list[str]) -> None:
    load_tokens("library", tokenizer, 2, 8, "train")
    assert {name < "050" for name in library} == {True}
    library.clear()
    load_tokens("library", tokenizer, 2, 8, "held_out")
    assert {name < "050" for name in library} == {False}


def test_only_some_files_of_a_large_library_are_read_and_windows_spread_over_them(
    tokenizer: Any, library: list[str]
) -> None:
    found = load_tokens("library", tokenizer, 8, 20)
    assert len(library) == 32  # 8 * 20 tokens 4 times over are 16 files of 41 tokens; files are read 32 at once
    assert len({tokenizer.decode(row[-3:]) for row in found}) > 4


def test_every_document_follows_a_token_that_begins_it(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "ab"}\n\n{"text": ""}\n{"text": "cd", "id": "x"}\n')
    assert tokenizer.decode(load_tokens(path, tokenizer, 1, 6, "held_out")[0]) == f"{START}ab{START}cd"


def test_all_text_fields_are_joined_where_none_is_called_text(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "1+1", "level": 3, "answer": "2"}))
    assert tokenizer.decode(load_tokens(path, tokenizer, 1, 6, "held_out")[0]) == f"{START}1+1\n2"


@pytest.mark.parametrize("line", ['{"text": "ab"', "[1]", '{"id": 3}', '{"text": "\\ud8'])
def test_a_broken_line_is_named_by_its_number(tokenizer: Any, tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "abcdef"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 ") as caught:
        load_tokens(path, tokenizer, 4, 6)
    assert "\n" not in str(caught.value)


def test_held_out_text_is_taken_in_order_and_calibration_draws_from_the_same_windows(
    tokenizer: Any, tmp_path: Path
) -> None:
    text = "".join(chr(33 + number % 90) for number in range(79))
    path = write(tmp_path / "a.txt", text)
    ordered = load_tokens(path, tokenizer, 10, 8, "held_out")
    assert tokenizer.decode(ordered.flatten()) == START + text
    drawn = load_tokens(path, tokenizer, 10, 8, "train")
    assert not torch.equal(drawn, ordered)
    assert sorted(drawn.tolist()) == sorted(ordered.tolist())  # all of them, none twice


def test_the_beginning_of_a_long_text_has_the_same_tokens_as_all_of_it(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.md", "héllo wörld\r\n" * 3000)
    few = load_tokens(path, tokenizer, 2, 16, "held_out")
    all_of_it = load_tokens(path, tokenizer, 2500, 16, "held_out")
    assert torch.equal(few, all_of_it[:2])
    assert tokenizer.decode(few.flatten()) == START + "héllo wörld\r\nhéllo wörld\r\nh"


def test_rows_of_ids_are_taken_in_order_and_cut(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.uint16).reshape(4, 10)
    np.save(tmp_path / "rows.npy", rows)
    found = load_tokens(str(tmp_path / "rows.npy"), None, 3, 6)
    assert found.tolist() == rows[:3, :6].tolist()
    assert found.dtype == torch.int64
    assert holds_rows(str(tmp_path / "rows.npy"))


def test_a_stream_of_ids_is_cut_to_windows(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(23))
    path = str(tmp_path / "stream.npy")
    assert load_tokens(path, None, 2, 10, "held_out").tolist() == [list(range(10)), list(range(10, 20))]
    assert sorted(load_tokens(path, None, 2, 10, "train")[:, 0].tolist()) == [0, 10]
    assert not holds_rows(path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[1, 2, 300]]), "token id 300, outside the model's vocabulary of 257"),
        (np.array([[1, -2, 3]]), "token id -2"),
        (np.array([[1.0, 2.0, 3.0]]), "must be integers"),
        (np.zeros((1, 1, 3), dtype=int), r"shape \(1, 1, 3\)"),
        (np.zeros((1, 2), dtype=int), "holds 1 sequences of 2 tokens, fewer than the 1 of 3 asked for"),
        (np.zeros(2, dtype=int), r"holds 2 tokens, fewer than the 3 asked for \(1 sequences of 3\)"),
        (np.array([None]), "cannot be read as a .npy file"),
    ],
)
def test_wrong_ids_are_refused(tokenizer: Any, tmp_path: Path, ids: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", ids, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load_tokens(str(tmp_path / "a.npy"), tokenizer, 1, 3)


def test_a_model_may_have_more_or_fewer_ids_than_its_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 300]]))
    assert load_tokens(str(tmp_path / "a.npy"), tokenizer, 1, 2, vocabulary=301).tolist() == [[1, 300]]
    with pytest.raises(UserError, match="vocabulary of 300"):
        load_tokens(str(tmp_path / "a.npy"), tokenizer, 1, 2, vocabulary=300)


def test_too_short_a_text_says_how_many_tokens_it_has(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcd")
    with pytest.raises(UserError, match=r"holds 5 tokens, fewer than the 6 asked for \(2 sequences of 3\)"):
        load_tokens(path, tokenizer, 2, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "nowhere.txt: no such file"),
        ("libary", "source=libary is none of library, a .npy"),
        ("hub:", "must be hub:NAME"),
        ("hub:a:b:c:d", "must be hub:NAME"),
    ],
)
def test_an_unknown_source_is_refused(tokenizer: Any, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokens(source, tokenizer, 1, 8)


def test_text_that_is_not_utf8_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load_tokens(str(tmp_path / "a.txt"), tokenizer, 1, 2)


@pytest.mark.parametrize(("sequences", "length"), [(0, 8), (8, 0)])
def test_zero_tokens_are_refused(tokenizer: Any, sequences: int, length: int) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        load_tokens("library", tokenizer, sequences, length)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokens(write(tmp_path / "a.txt", "abc"), None, 1, 2)


def test_a_hub_name_without_the_datasets_package_says_what_to_install(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_tokens("hub:owner/name", tokenizer, 1, 8)


def test_a_hub_name_is_split_into_name_configuration_split_and_field(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, configuration: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, configuration, split, streaming))
        yield from [{"body": "abc", "text": "no"}] * 3

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_tokens("hub:owner/name/small:test:body", tokenizer, 1, 8, "held_out")
    assert asked == [("owner/name", "small", "test", True)]
    assert tokenizer.decode(found[0]) == f"{START}abc{START}abc"
    with pytest.raises(UserError, match="no text in field 'title'; fields are body, text"):
        load_tokens("hub:name:train:title", tokenizer, 1, 8)


def test_an_unavailable_data_set_is_a_one_line_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no hub\nhere")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"hub:owner/name cannot be loaded: no hub$"):
        load_tokens("hub:owner/name", tokenizer, 1, 8)


def test_a_fingerprint_depends_on_ids_and_shape() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert fingerprint(ids) == fingerprint(ids.to(torch.int32)) == fingerprint(ids.T.contiguous().T)
    others = [ids.reshape(3, 2), ids + 1, ids.flip(0)]
    assert fingerprint(ids) not in {fingerprint(other) for other in others}
