"""Every source of text is divided into parts that share no token and that each cover the whole of it."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hasten.accel.data import tokens
from hasten.accel.data.parts import ROLES, Part, larger_calibrations
from hasten.accel.data.tokens import calibration_part, load_tokens
from hasten.accel.errors import UserError
from hasten.accel.evaluation.perplexity import load_windows
from tests.data.one_token_a_byte import one_token_a_byte

LINES = 12_000  # of 8 characters, each different
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with one token a byte, and none that begins or ends a text."""
    return PreTrainedTokenizerFast(tokenizer_object=one_token_a_byte())


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections as small as the texts of these tests."""
    monkeypatch.setattr(tokens, "_SECTION", {"bytes": 2000, "tokens": 2000, "rows": 10})


@cache
def lines() -> list[str]:
    return [f"{number:07}\n" for number in range(LINES)]


def txt(folder: Path, _: Any) -> str:
    (folder / "a.txt").write_text("".join(lines()))
    return str(folder / "a.txt")


def one_line(folder: Path, _: Any) -> str:
    (folder / "a.md").write_text("".join(lines()).replace("\n", " "))
    return str(folder / "a.md")


def jsonl(folder: Path, _: Any) -> str:
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": "".join(lines()[n : n + 9])}) + "\n" for n in range(0, LINES, 9))
    )
    return str(folder / "a.jsonl")


def hub(_: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def load_dataset(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield from ({"text": "".join(lines()[n : n + 9])} for n in range(0, LINES, 9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return "hub:owner/name"


def stream(folder: Path, _: Any) -> str:
    np.save(folder / "stream.npy", np.arange(90_000, dtype=np.uint32))
    return str(folder / "stream.npy")


def rows(folder: Path, _: Any) -> str:
    np.save(folder / "rows.npy", np.arange(64_000, dtype=np.uint32).reshape(-1, LENGTH))
    return str(folder / "rows.npy")


SOURCES = (txt, one_line, jsonl, hub, stream, rows)


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__)
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    made: str = request.param(tmp_path, monkeypatch)
    return made


def places(found: torch.Tensor, tokenizer: Any, source: str) -> set[int]:
    """Places in the source of all tokens; asserts that windows are runs of it, none of which overlap."""
    if source.startswith("hub:"):
        # Documents of other parts are missing between those of this one: windows are no runs of the source.
        seen = [number for row in found for number in re.findall(r"(?<=\n)\d{7}(?=\n)", tokenizer.decode(row))]
        assert len(set(seen)) == len(seen)
        return set(map(int, seen))
    if source.endswith(".npy"):
        starts = found[:, 0].tolist()
        assert torch.equal(found, found[:, :1] + torch.arange(found.shape[1]))
    else:
        whole = "".join(lines()).replace("\n", " ")
        starts = [whole.find(tokenizer.decode(row).replace("\n", " ")) for row in found]
    assert min(starts) >= 0
    covered = {start + offset for start in starts for offset in range(found.shape[1])}
    assert len(covered) == found.numel()
    return covered


def test_parts_share_no_token_and_each_covers_the_whole_text(source: str, tokenizer: Any) -> None:
    part = calibration_part(source, tokenizer, 100, LENGTH)
    assert part == Part("calibration")
    found = [
        places(load_tokens(source, tokenizer, 100, LENGTH, seed=seed, vocabulary=10**6, part=part), tokenizer, source)
        for seed in (0, 1, 2)
    ]
    assert found[0] != found[1]
    others = [
        load_tokens(source, tokenizer, 60, LENGTH, seed=1, vocabulary=10**6, part=Part("search")),
        load_windows(source, tokenizer, 40, LENGTH, vocabulary=10**6, part=Part("evaluation")).tokens,
    ]
    sets = [set.union(*found), *(places(other, tokenizer, source) for other in others)]
    for index, one in enumerate(sets):
        assert not any(one & other for other in sets[:index])
        if not source.startswith("hub:"):  # a stream whose end is not read
            size = 64_000 if source.endswith("rows.npy") else 90_000
            assert min(one) < size / 5
            assert max(one) > size * 4 / 5


def test_overlapping_windows_stay_in_the_part(tmp_path: Path, tokenizer: Any) -> None:
    source = stream(tmp_path, None)
    cut = load_windows(source, None, 24, LENGTH, stride=8, vocabulary=10**6, part=Part("evaluation"))
    used = set(cut.tokens[(torch.arange(LENGTH) < cut.stop[:, None])].tolist())
    calibration = load_tokens(source, None, 500, LENGTH, vocabulary=10**6, part=Part("calibration"))
    assert used
    assert not used & set(calibration.flatten().tolist())


@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 128, 5000, 10**6 + 7])
@pytest.mark.parametrize("calibration", larger_calibrations())
def test_ranges_of_the_roles_are_a_division(size: int, calibration: int) -> None:
    ranges = sorted(span for role in ROLES for span in Part(role, calibration).ranges(size, 10))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert [stop for _, stop in ranges[:-1]] == [first for first, _ in ranges[1:]]


def test_by_default_half_of_the_text_is_calibration_s_and_evaluation_has_two_tenths() -> None:
    lengths = {role: sum(stop - first for first, stop in Part(role).ranges(10**6, 10**4)) for role in ROLES}
    # Each of 64 sections is rounded to whole bytes.
    assert lengths == pytest.approx({"calibration": 500_000, "search": 300_000, "evaluation": 200_000}, abs=64)


def test_a_calibration_that_needs_all_rows_gets_them_in_order(tmp_path: Path) -> None:
    ids = np.arange(128 * 4).reshape(128, 4)
    np.save(tmp_path / "a.npy", ids)
    source = str(tmp_path / "a.npy")
    part = calibration_part(source, None, 128, 4)
    assert part.calibration == 10
    assert load_tokens(source, None, 128, 4, seed=3, part=part).tolist() == ids.tolist()
    part = calibration_part(source, None, 80, 4)
    few = load_tokens(source, None, 80, 4, part=part)
    assert few[:, 0].tolist() == sorted(few[:, 0].tolist())
    for role in ("search", "evaluation"):
        other = load_tokens(source, None, 5, 4, part=Part(role, part.calibration))
        assert not set(few.flatten().tolist()) & set(other.flatten().tolist())


def test_a_part_of_few_long_windows_joins_its_ranges(tmp_path: Path) -> None:
    source = stream(tmp_path, None)
    # 18,000 tokens for evaluation in ranges of 400: none of them holds a window.
    found = load_tokens(source, None, 10, 1500, "held_out", vocabulary=10**6, part=Part("evaluation"))
    assert len(set(found.flatten().tolist())) == 15_000


@pytest.mark.parametrize("make", [txt, jsonl, stream], ids=lambda make: make.__name__)
def test_a_text_too_short_for_a_part_says_what_it_has_and_what_is_needed(
    make: Callable[[Path, Any], str], tmp_path: Path, tokenizer: Any
) -> None:
    source = make(tmp_path, None)
    total = 96_000 if make is not stream else 90_000
    part = Part("search")
    with pytest.raises(UserError) as caught:
        load_tokens(source, tokenizer, 2000, LENGTH, vocabulary=10**6, part=part)
    message = str(caught.value)
    assert f"source={source} holds {total} tokens, of which 2" in message
    assert "are for search, fewer than the 64000 asked for (2000 sequences of 32)" in message
    assert message.endswith("give a longer text or fewer sequences, or search.source=OTHER")
    assert "\n" not in message


def test_rows_too_few_for_a_part_say_how_many_there_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((10, 8), dtype=int))
    with pytest.raises(
        UserError, match="holds 10 sequences of 8 tokens, of which 2 are for evaluation, fewer than the 3"
    ):
        load_tokens(str(tmp_path / "a.npy"), None, 3, 8, part=Part("evaluation"))


def test_the_library_s_parts_come_from_different_files(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, set[str]] = {}
    for role in ROLES:
        names: set[str] = set()
        from hasten.accel.data import documents

        def texts(_: Path, files: list[str], names: set[str] = names) -> Iterator[str]:
            names.update(files)
            yield "x" * 100_000

        monkeypatch.setattr(documents, "read_texts", texts)
        load_tokens("library", tokenizer, 4, LENGTH, seed=5, part=Part(role), split="held_out")
        read[role] = names
    assert all(read.values())
    assert not read["calibration"] & read["search"]
    assert not read["calibration"] & read["evaluation"]
    assert not read["search"] & read["evaluation"]


def test_a_text_without_lines_is_cut_between_characters(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    # Ranges of 2000 bytes would begin inside a character.
    path.write_text("x" + "é" * 50_000, encoding="utf-8")
    known = set(tokenizer("xé")["input_ids"])
    for role in ROLES:
        found = load_tokens(str(path), tokenizer, 100, 17, part=Part(role))
        assert set(found.flatten().tolist()) <= known
