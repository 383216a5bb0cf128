"""Windows begin as a tokenizer begins a text, with tokens that are context and are not scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hasten.accel.data.begin import begin_tokens, separator_tokens
from hasten.accel.data.parts import ROLES, Part
from hasten.accel.data.tokens import StreamWindows, load_tokens
from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import load_windows, windows
from tests.data.one_token_a_byte import one_token_a_byte

SPECIAL = ("<bos>", "<eos>", "<sop>")


def make(template: str | None, **named: str) -> Any:
    """A tokenizer of one token a letter, whose encoded texts follow a template such as `<bos> $A <eos>`."""
    made = one_token_a_byte()
    made.add_special_tokens(list(SPECIAL))
    if template is not None:
        ids = [(name, made.token_to_id(name)) for name in SPECIAL if name in template]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def cut(text: list[int], begin: tuple[int, ...] = ()) -> np.ndarray:
    """All windows of 4 tokens."""
    found = StreamWindows.of([np.array(text)], 4, begin)
    return found.take([*range(len(found))])


BOS, EOS, SOP = 256, 257, 258


@pytest.mark.parametrize(
    ("template", "named", "begin", "separator"),
    [
        ("<bos> $A", {"bos_token": "<bos>", "eos_token": "<eos>"}, (BOS,), (BOS,)),
        ("<bos> $A <eos>", {"bos_token": "<bos>", "eos_token": "<eos>"}, (BOS,), (BOS,)),
        ("$A <eos>", {"bos_token": "<bos>", "eos_token": "<eos>"}, (), (EOS,)),
        ("<bos> <sop> $A", {}, (BOS, SOP), (BOS, SOP)),
        (None, {"bos_token": "<bos>", "eos_token": "<eos>"}, (), (EOS,)),
        (None, {"bos_token": "<bos>"}, (), (BOS,)),
        (None, {}, (), ()),
    ],
)
def test_the_begin_is_what_the_tokenizer_adds_and_not_its_bos_token(
    template: str | None, named: dict[str, str], begin: tuple[int, ...], separator: tuple[int, ...]
) -> None:
    tokenizer = make(template, **named)
    assert begin_tokens(tokenizer) == begin
    assert separator_tokens(tokenizer, begin) == separator


def test_a_window_repeats_no_begin_of_the_stream_and_loses_no_token() -> None:
    text = [BOS, 1, 2, 3, BOS, 4, 5, 6, 7, 8, BOS, 9]
    assert cut(text, (BOS,)).tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6], [BOS, 7, 8, BOS]]
    assert cut(text).tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6], [7, 8, BOS, 9]]
    assert cut([BOS, 1], (BOS,)).shape == (0, 4)


@pytest.mark.parametrize("begin", [(), (BOS,)])
def test_a_stream_is_not_copied_and_no_window_reaches_into_the_next(begin: tuple[int, ...]) -> None:
    stream = np.arange(9, dtype=np.uint16)
    assert StreamWindows.of([stream], 4, begin).stream is stream
    found = StreamWindows.of([stream, stream + 100], 4, begin)
    size = 4 - len(begin)
    texts = [[place + offset for offset in range(size)] for place in range(0, 9 - size + 1, size)]
    assert found.take([*range(len(found))]).tolist() == [
        [*begin, *(shift + token for token in text)] for shift in (0, 100) for text in texts
    ]


@pytest.mark.parametrize("role", [None, *ROLES])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "stream.npy", "rows.npy"])
def test_every_window_of_every_part_begins_once_and_no_end_enters(
    role: str | None, suffix: str, tmp_path: Path
) -> None:
    tokenizer = make("<bos> $A <eos>", bos_token="<bos>", eos_token="<eos>")
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt":
        path.write_text("abcdefg\n" * 500)
    elif suffix == "jsonl":
        path.write_text((json.dumps({"text": "abcdefghijk"}) + "\n") * 300)
    else:
        ids = np.arange(4000) % 100
        np.save(path, ids if suffix == "stream.npy" else ids.reshape(-1, 20))
    part = role and Part(role)
    found = load_tokens(str(path), tokenizer, 8, 16, part=part or None, begin=(BOS,))
    assert found.shape == (8, 16)
    assert (found[:, 0] == BOS).all()
    assert (found[:, 1] != BOS).all()
    assert not (found == EOS).any()
    cut = load_windows(str(path), tokenizer, 8, 16, part=part or None, begin=(BOS,))
    assert (cut.tokens[:, 0] == BOS).all()
    assert cut.first.tolist() == [1] * 8
    assert not (cut.tokens[cut.is_scored] == BOS).any()


def test_rows_of_ids_that_begin_already_are_not_changed(tmp_path: Path) -> None:
    ids = np.array([[BOS, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    np.save(tmp_path / "a.npy", ids)
    found = load_tokens(str(tmp_path / "a.npy"), None, 2, 4, vocabulary=300, begin=(BOS,))
    assert found.tolist() == [[BOS, 1, 2, 3], [BOS, 5, 6, 7]]


def test_overlapping_windows_begin_too_and_score_every_token_of_the_text_once() -> None:
    cut = windows(torch.arange(20), 8, 3, (BOS,))
    assert (cut.tokens[:, 0] == BOS).all()
    assert sorted(cut.tokens[cut.is_scored].tolist()) == list(range(20))
    for row, first, stop in zip(cut.tokens.tolist(), cut.first.tolist(), cut.stop.tolist(), strict=True):
        assert row[1:stop] == list(range(row[1], row[1] + stop - 1))
        assert first == 1 if row[1] == 0 else first > 1
    # The first window of a stream that begins itself, and one that starts at the begin of a document inside it.
    cut = windows(torch.tensor([BOS, 1, 2, BOS, 3, 4]), 4, 3, (BOS,))
    assert cut.tokens.tolist() == [[BOS, 1, 2, 0], [BOS, 3, 4, 0]]
    assert cut.tokens[cut.is_scored].tolist() == [1, 2, 3, 4]


def test_as_many_tokens_are_scored_with_a_begin_as_without(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(64).reshape(4, 16))
    source = str(tmp_path / "a.npy")
    scored = [load_windows(source, None, 4, 16, vocabulary=300, begin=begin).scored for begin in ((), (BOS,))]
    assert scored == [4 * 15, 4 * 15]


def test_a_window_must_have_room_behind_its_begin(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 16), dtype=int))
    with pytest.raises(UserError, match="sequence_length=2 leaves no token behind the 2 that begin a text"):
        load_tokens(str(tmp_path / "a.npy"), None, 1, 2, vocabulary=300, begin=(BOS, SOP))
