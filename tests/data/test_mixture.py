"""Mixtures of texts, and documents from .parquet files."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hasten.accel.data.mixture import Component, absolute, components, counts
from hasten.accel.data.parts import Part
from hasten.accel.data.tokens import calibration_part, load_sample, load_tokens
from hasten.accel.errors import UserError
from tests.data.one_token_a_byte import one_token_a_byte


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=one_token_a_byte())


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Texts of the letters a and b alone."""
    for letter in "ab":
        lines = [json.dumps({"text": letter * 20}) for _ in range(100)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_weights_are_shares_of_all_tokens(tokenizer: Any, files: tuple[str, str]) -> None:
    source = f"mix:{files[0]}:7+{files[1]}:3"
    sample = load_sample(source, tokenizer, 20, 16, seed=3)
    letters = ["".join(sorted(set(tokenizer.decode(row)))) for row in sample.tokens]
    assert (letters.count("a"), letters.count("b")) == (14, 6)
    first, second = sample.readings
    assert (first.weight, first.sequences, first.tokens) == (0.7, 14, 14 * 16)
    assert (second.source, second.tokens) == (files[1], 6 * 16)
    assert 20 < first.documents <= 100
    # Both are everywhere: the calibrators' parts are mixtures, too.
    assert len(set(letters[:10])) == len(set(letters[10:])) == 2
    again = load_tokens(source, tokenizer, 20, 16, seed=3)
    assert torch.equal(sample.tokens, again)
    assert not torch.equal(sample.tokens, load_tokens(source, tokenizer, 20, 16, seed=4))


def test_parts_of_a_mixture_share_no_line_of_any_source(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{number:05}"}) for number in range(4000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    source = f"mix:{tmp_path / 'a.jsonl'}:1+{tmp_path / 'b.jsonl'}:1"
    part = calibration_part(source, tokenizer, 32, 60)
    seen = []
    for role in ("calibration", "search", "evaluation"):
        rows = load_tokens(source, tokenizer, 8, 60, part=Part(role, part.calibration))
        # Windows may begin inside a line.
        seen.append(
            {line for row in rows for line in tokenizer.decode(row).replace("b", " b").replace("a", " a").split()}
        )
    assert all(len(lines) > 40 for lines in seen)
    whole = [{line for line in lines if len(line) == 6} for lines in seen]
    assert len(set.union(*whole)) == sum(map(len, whole))


def test_names_of_sources_may_hold_colons_and_plus_signs() -> None:
    found = components("mix:hub:owner/name:train:text:0.5+c++.jsonl:1+library:.5")
    assert found == [
        Component("hub:owner/name:train:text", 0.25),
        Component("c++.jsonl", 0.5),
        Component("library", 0.25),
    ]
    assert components("a.jsonl") == [Component("a.jsonl", 1.0)]


def test_counts_add_up_by_largest_remainder() -> None:
    parts = components("mix:a:1+b:1+c:1")
    assert counts(parts, 8, "") == [3, 3, 2]
    assert sum(counts(components("mix:a:0.61+b:0.39"), 7, "")) == 7


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("mix:a.jsonl", "SOURCE:WEIGHT"),
        ("mix:a.jsonl:0.5+", "SOURCE:WEIGHT"),
        ("mix:a.jsonl:0.5+b.jsonl", "SOURCE:WEIGHT"),
        ("mix:a.jsonl:0+b.jsonl:1", "above 0"),
        ("mix:a.jsonl:1+a.jsonl:1", "each source once"),
        ("mix:nowhere.jsonl:1+library:1", "no such file"),
        ("mix:library:999+nowhere.jsonl:1", "none of the 4 sequences"),
    ],
)
def test_wrong_mixtures_are_named(source: str, words: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=words):
        load_tokens(source, tokenizer, 4, 8)


def test_a_mixture_is_recorded_with_absolute_paths(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(files[0]).parent)
    recorded = absolute("mix:a.jsonl:3+library:1")
    assert recorded == f"mix:{files[0]}:0.75+library:0.25"
    assert components(recorded) == [Component(files[0], 0.75), Component("library", 0.25)]


def test_rows_of_a_parquet_file_are_records(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"{number:03}", "output": "yes"} for number in range(300)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    sample = load_sample(str(file), tokenizer, 10, 7, "held_out")
    assert tokenizer.decode(sample.tokens[1]) == "001\nyes"
    drawn = [
        set(tokenizer.decode(load_tokens(str(file), tokenizer, 6, 35, part=Part(role)).flatten()).split())
        for role in ("calibration", "search", "evaluation")
    ]
    numbers = [{int(word.replace("yes", "") or 0) % 10 for word in words} - {0} for words in drawn]
    assert numbers == [{1, 2, 3, 4}, {5, 6, 7}, {8, 9}]
    file.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as a \.parquet file"):
        load_tokens(str(file), tokenizer, 1, 7)
