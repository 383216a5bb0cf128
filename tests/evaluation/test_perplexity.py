from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.accel.data.library import is_held_out
from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import Windows, load_windows, windows


def contexts(cut: Windows) -> dict[int, int]:
    """Number of tokens before each scored token in its window, by token; in these tests a token is its position."""
    found: dict[int, int] = {}
    for row, first, stop in zip(cut.tokens.tolist(), cut.first.tolist(), cut.stop.tolist(), strict=True):
        for position in range(first, stop):
            assert row[position] not in found, "scored twice"
            assert row[:position] == list(range(row[position] - position, row[position])), "not the tokens before it"
            found[row[position]] = position
    return found


def by_the_guide(size: int, length: int, stride: int) -> dict[int, int]:
    """The same by the loop of transformers' guide: labels are shifted by one, so the first of a window has no score."""
    found: dict[int, int] = {}
    previous = 0
    for begin in range(0, size, stride):
        end = min(begin + length, size)
        for position in range(max(previous - begin, 1), end - begin):
            found[begin + position] = position
        previous = end
        if end == size:
            break
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 15, 16, 17, 29])
@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
def test_tokens_are_scored_as_in_the_guide(size: int, stride: int) -> None:
    cut = windows(torch.arange(size), 8, stride)
    assert contexts(cut) == by_the_guide(size, 8, stride)
    assert cut.scored == len(by_the_guide(size, 8, stride))
    if stride < 8:
        assert set(contexts(cut)) == set(range(1, size))


def test_a_stride_of_a_whole_window_gives_disjoint_windows() -> None:
    rows = torch.arange(24).reshape(3, 8)
    for cut in (windows(rows.flatten(), 8, 8), windows(rows, 8), windows(rows, 8, 3)):
        assert torch.equal(cut.tokens, rows)
        assert cut.first.tolist() == [1, 1, 1]
        assert cut.stop.tolist() == [8, 8, 8]


def test_rows_are_streams_of_their_own() -> None:
    rows = torch.stack([torch.arange(12), torch.arange(100, 112)])
    assert contexts(windows(rows, 8, 4)) == {
        **contexts(windows(rows[0], 8, 4)),
        **contexts(windows(rows[1], 8, 4)),
    }


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_hold_every_window_once(parts: int) -> None:
    cut = windows(torch.arange(50), 8, 5)
    pieces = [cut.part(index, parts) for index in range(parts)]
    assert torch.equal(torch.cat([piece.tokens for piece in pieces]), cut.tokens)
    assert torch.equal(torch.cat([piece.first for piece in pieces]), cut.first)
    assert sum(piece.scored for piece in pieces) == cut.scored


def test_overlapping_windows_move_over_the_beginning_of_a_stream(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(40))
    cut = load_windows(str(tmp_path / "stream.npy"), None, 4, 8, stride=4, vocabulary=40)
    assert contexts(cut) == by_the_guide(32, 8, 4)


def test_rows_that_are_single_windows_leave_a_stride_nothing_to_move_over(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(40).reshape(5, 8))
    path = str(tmp_path / "rows.npy")
    assert load_windows(path, None, 4, 8).scored == 4 * 7
    with pytest.raises(UserError, match="stride=4 has nothing to move over"):
        load_windows(path, None, 4, 8, stride=4)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_a_window_or_stride_out_of_range_is_refused(length: int, stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        windows(torch.arange(30), length, stride)
    with pytest.raises(UserError, match=f"sequence_length={length}"):
        load_windows("library", None, 4, length, stride=stride)


def test_evaluation_never_reads_the_files_that_models_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    root = Path("library")

    class Root:
        def __truediv__(self, name: str) -> Path:
            read.append(name)
            return root / name

    monkeypatch.setattr("hasten.accel.data.documents.library_root", Root)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"text")

    def tokenizer(text: str | list[str], **_: object) -> dict[str, list[int] | list[list[int]]]:
        return {"input_ids": [1, 2] if isinstance(text, str) else [[1, 2]] * len(text)}

    tokenizer.bos_token_id = tokenizer.eos_token_id = None  # type: ignore[attr-defined]
    load_windows("library", tokenizer, 2, 8, vocabulary=10)
    assert read
    assert all(is_held_out(name) for name in read)
