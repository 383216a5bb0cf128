"""The texts of a run by its options, with the tokenizers of the embedded and of other models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.jobs.common.quality import quality_warnings
from hasten.jobs.common.schema import Calibration, Evaluation
from hasten.jobs.common.texts import Origin, Texts, print_texts
from hasten.jobs.search.options import SearchTokens

TARGET = embedded.path("target")
SMALL = Calibration(sequences=8, sequence_length=32)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text whose lines are all different."""
    (tmp_path / "users.txt").write_text("".join(f"line {number} of a user's own text\n" for number in range(3000)))
    return str(tmp_path / "users.txt")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A checkpoint that is no embedded one, and whose tokenizer begins every text with <|pad|> and ends it."""
    folder = tmp_path / "foreign"
    shutil.copytree(TARGET, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A <|endoftext|>", special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|pad|>"}))
    return folder


def calibration(source: str, seed: int = 0) -> Calibration:
    return Calibration(source=source, sequences=8, sequence_length=32, seed=seed)


def drawn(folder: Path, source: str, bos: str = "auto", seed: int = 0) -> tuple[Any, Any, Any, Texts]:
    """Tokens of the three texts, where only the calibration names a source."""
    texts = Texts(folder, bos, None)
    tokens = texts.calibrate(calibration(source, seed), is_needed=True)
    search = texts.search(SearchTokens(sequences=8, sequence_length=32))
    windows = texts.evaluate(Evaluation(sequences=8, sequence_length=32))
    return tokens, search, windows, texts


def test_search_and_evaluation_follow_the_calibration_s_text_and_no_seed_of_it(text: str) -> None:
    tokens, search, windows, texts = drawn(TARGET, text)
    others = drawn(TARGET, text, seed=1)
    assert not torch.equal(tokens, others[0])
    assert torch.equal(search, others[1])
    assert torch.equal(windows.tokens, others[2].tokens)
    report = texts.report(TARGET)["texts"]
    assert {role: entry["part"] for role, entry in report.items()} == {role: role for role in report}
    assert {entry["source"] for entry in report.values()} == {text}
    assert len({entry["fingerprint"] for entry in report.values()}) == 3


def test_a_source_of_its_own_is_used_as_a_whole(text: str, tmp_path: Path) -> None:
    ids = np.arange(64).reshape(4, 16)
    np.save(tmp_path / "ids.npy", ids)
    texts = Texts(TARGET, "auto", None)
    texts.calibrate(SMALL, is_needed=True)
    for found in (
        texts.search(SearchTokens(str(tmp_path / "ids.npy"), 4, sequence_length=16)),
        texts.evaluate(Evaluation(str(tmp_path / "ids.npy"), 4, sequence_length=16)).tokens,  # type: ignore[union-attr]
    ):
        assert found.tolist() == ids.tolist()
    assert texts.report(None)["texts"]["evaluation"]["part"] is None


def test_a_method_without_calibration_tokens_is_measured_on_the_same_text(text: str) -> None:
    texts = Texts(TARGET, "auto", None)
    assert texts.calibrate(calibration(text), is_needed=False) is None
    windows = texts.evaluate(Evaluation(sequences=8, sequence_length=32))
    assert windows is not None
    assert windows.fingerprint() == drawn(TARGET, text)[2].fingerprint()
    assert texts.report(TARGET)["texts"]["calibration"] is None


def test_the_begin_that_a_tokenizer_adds_is_before_every_window_and_an_option(foreign: Path, text: str) -> None:
    for source in (text, "library"):
        *found, texts = drawn(foreign, source)
        for tokens in (found[0], found[1], found[2].tokens):
            assert (tokens[:, 0] == 1).all()
            assert not (tokens == 0).any()  # the end that the tokenizer adds to a text
        assert found[2].scored == int((found[2].tokens != 1).sum())
        entry = texts.report(foreign)["texts"]["evaluation"]
        assert (entry["begin"], entry["begin_text"]) == ([1], "<|pad|>")
    for folder, bos, begin in (
        (foreign, "false", ()),
        (foreign, "true", (1,)),
        (TARGET, "auto", ()),
        (TARGET, "true", (0,)),
    ):
        assert drawn(folder, text, bos)[3].begin == begin


def test_a_begin_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(TARGET, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    with pytest.raises(
        UserError, match=r"bos=true, but .* names no token that begins a text: use bos=auto or bos=false"
    ):
        Texts(folder, "true", None)
    assert Texts(folder, "auto", None).begin == ()


@pytest.mark.parametrize("is_foreign", [False, True])
def test_hasten_s_own_text_is_named_on_other_models_alone(
    is_foreign: bool, foreign: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign if is_foreign else TARGET
    texts = Texts(folder, "auto", None)
    texts.calibrate(SMALL, is_needed=True)
    texts.evaluate(Evaluation(sequences=2, sequence_length=32))
    report = texts.report(folder)
    assert report["texts"]["evaluation"]["is_own_text"] == is_foreign
    print_texts(report)
    printed = capsys.readouterr().out
    assert "text: library, 256 tokens for calibration and 62 tokens for evaluation" in printed
    assert ("note: the text of calibration and evaluation is hasten's own" in printed) == is_foreign
    *_, texts = drawn(folder, text)
    print_texts(texts.report(folder))
    assert "hasten's own" not in capsys.readouterr().out


def test_identities_of_original_tokenizer_and_text_tell_what_can_be_compared(foreign: Path, text: str) -> None:
    reports = [drawn(TARGET, text)[3].report(TARGET), drawn(TARGET, text, seed=1)[3].report(TARGET)]
    keys = ("original", "tokenizer")
    assert [reports[0][key] for key in keys] == [reports[1][key] for key in keys]
    assert reports[0]["texts"]["evaluation"] == reports[1]["texts"]["evaluation"]
    other = drawn(foreign, text)[3].report(foreign)
    assert other["tokenizer"]["fingerprint"] != reports[0]["tokenizer"]["fingerprint"]
    assert other["texts"]["evaluation"]["fingerprint"] != reports[0]["texts"]["evaluation"]["fingerprint"]
    draft = embedded.path("draft")
    again = drawn(draft, text)[3].report(draft)
    assert again["original"]["fingerprint"] != reports[0]["original"]["fingerprint"]
    assert again["tokenizer"] == reports[0]["tokenizer"]
    assert again["texts"] == reports[0]["texts"]


def test_a_mixture_of_packed_documents_is_reported_with_its_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("chat", "code"):
        lines = [json.dumps({"text": f"{name} {number} " * 5}) for number in range(1500)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    source = f"mix:{tmp_path / 'chat.jsonl'}:3+{tmp_path / 'code.jsonl'}:1"
    texts = Texts(TARGET, "auto", None)
    options = Calibration(source=source, sequences=8, sequence_length=64, packing="documents")
    packed = texts.calibrate(options, is_needed=True)
    assert packed is not None
    assert packed.shape == (8, 2, 64)
    # Search and evaluation read other parts of the same mixture, as streams.
    assert texts.search(SearchTokens(sequences=4, sequence_length=32)).shape == (4, 32)
    assert texts.evaluate(Evaluation(sequences=4, sequence_length=32)) is not None
    report = texts.report(TARGET)
    entry = report["texts"]["calibration"]
    assert (entry["packing"], entry["tokens"]) == ("documents", 512)
    assert [(row["share"], row["tokens"], row["sequences"]) for row in entry["sources"]] == [
        (0.75, 384, 6),
        (0.25, 128, 2),
    ]
    assert all(row["documents"] > 8 for row in entry["sources"])
    assert report["tokenizer"]["template"] is None
    print_texts(report)
    printed = capsys.readouterr().out
    assert f"75.0% of {tmp_path / 'chat.jsonl'}, drawn from" in printed


def test_the_chat_template_is_identified(tmp_path: Path) -> None:
    found = set()
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        (tmp_path / "template.jinja").write_text(text)
        found.add(Texts(TARGET, "auto", str(tmp_path / "template.jinja")).report(None)["tokenizer"]["template"])
    assert len(found) == 2


def test_a_recorded_text_that_is_gone_is_named_with_the_option(tmp_path: Path) -> None:
    texts = Texts(TARGET, "auto", None, Origin(str(tmp_path / "gone.txt")))
    with pytest.raises(
        UserError, match=r"search.source=null is the text of the calibration, .*gone.txt, which does not"
    ):
        texts.search(SearchTokens())


@pytest.mark.parametrize(
    ("perplexity", "original", "named"),
    [
        (11.0, 10.0, None),
        (11.0, None, None),
        (4096.0, 4096.0, "the original's perplexity of 4096.0 is that of guessing"),
        (12.0, float("nan"), "the original's perplexity of nan is not finite"),
        (3000.0, 10.0, "the model's perplexity of 3000.0 is that of guessing"),
        (4096.0, None, "the model's perplexity of 4096.0 is that of guessing"),
        (None, None, None),
    ],
)
def test_models_that_guess_are_named(perplexity: float | None, original: float | None, named: str | None) -> None:
    metrics = {"perplexity": perplexity, "perplexity_original": original}
    warnings = quality_warnings(metrics, {"evaluation": {"guessing_perplexity": 300.0}})
    assert len(warnings) == (named is not None)
    assert named is None or warnings[0].startswith(named)
    assert quality_warnings(metrics, {"evaluation": None}) == []
