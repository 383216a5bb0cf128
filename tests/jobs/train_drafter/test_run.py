"""The job on the embedded pair and on tiny checkpoints, in this process."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.jobs.cli.main import main
from tests.jobs.report import last_report
from tests.models import tiny

METRICS = {"loss", "cross_entropy", "auc", "auc_best", "accepted", "error", "tokens", "held_out_tokens", "bytes"}
EMBEDDED = {"text.sequences": 8, "text.held_out": 4, "text.sequence_length": 32, "epochs": 2, "batch": 64}


@pytest.fixture
def draft(folder):
    """A smaller model beside the source, of the same vocabulary."""
    return tiny.save(folder / "draft", "llama", num_hidden_layers=1, hidden_size=32)


def train(**changes):
    """Exit code of a training; options with a dot are given with two underscores."""
    words = {key.replace("__", "."): value for key, value in changes.items()}
    return main(["train_drafter", *(f"{key}={value}" for key, value in words.items())])


def tokens(source, **changes):
    """Options of a quick training on the token ids beside the source."""
    text = {"text__source": source.parent / "tokens.npy", "text__sequences": 6, "text__held_out": 2}
    return {"target": source, "text__sequence_length": 16, "epochs": 1} | text | changes


def refused(folder, capsys, code):
    """The one line of a run that left nothing behind."""
    captured = capsys.readouterr()
    assert code == 2
    assert not (folder / "runs").exists()
    [line] = [line for line in captured.err.splitlines() if line.startswith("hasten: error: ")]
    return line


def test_the_embedded_pair_gets_a_head_and_the_run_says_how_to_use_it(folder, capsys):
    assert main(["train_drafter", *(f"{key}={value}" for key, value in EMBEDDED.items())]) == 0
    printed = capsys.readouterr().out
    path = printed.splitlines()[-1].removeprefix("report: ")
    report = json.loads((folder / path).read_text())
    head = folder / path.replace("report.json", FILE)
    assert f"drafter=specdec_pp drafter.head={head}" in printed
    assert report["job"] == "train_drafter"
    assert report["output"] == str(head)
    assert set(report["metrics"]) >= METRICS
    assert all(report["metrics"][name] is not None for name in METRICS)
    assert sum(row["tokens"] for row in report["calibration"]) == report["metrics"]["held_out_tokens"]
    assert AcceptanceHead.load(head).hidden_size == 128
    # 8 windows with 31 places each, of which about 85 % are drafted.
    assert 180 < report["metrics"]["tokens"] < 240


def test_a_head_is_the_same_from_the_same_seed_and_names_its_draft(source, draft, folder, capsys):
    for number, seed in enumerate((0, 0, 1)):
        assert train(**tokens(source, draft=draft, output=folder / f"{number}.safetensors", seed=seed)) == 0
    last_report(capsys)
    contents = [(folder / f"{number}.safetensors").read_bytes() for number in range(3)]
    assert contents[0] == contents[1] != contents[2]
    assert Checkpoint(draft).fingerprint().encode() in contents[0]
    assert AcceptanceHead.load(folder / "0.safetensors").hidden_size == 32


def test_hyper_parameters_of_the_head_are_given_by_either_name(source, draft, folder, capsys):
    same = {"draft": draft, "drafter": "specdec_pp"}
    assert train(**tokens(source, **same, output=folder / "long", head="acceptance", head__blocks=1)) == 0
    assert train(**tokens(source, **same, output=folder / "short", blocks=1, head__blocks=2)) == 0
    assert train(**tokens(source, **same, output=folder / "usual")) == 0
    capsys.readouterr()
    contents = {name: (folder / name).read_bytes() for name in ("long", "short", "usual")}
    assert contents["long"] == contents["short"] != contents["usual"]
    assert len(AcceptanceHead.load(folder / "short").blocks) == 1


def test_an_existing_output_is_refused_and_kept(source, draft, folder, capsys):
    mine = folder / "mine.safetensors"
    mine.write_text("mine")
    line = refused(folder, capsys, train(**tokens(source, draft=draft, output=mine)))
    assert f"output={mine} exists already" in line
    assert mine.read_text() == "mine"


def test_an_output_in_no_folder_is_refused(source, draft, folder, capsys):
    line = refused(folder, capsys, train(**tokens(source, draft=draft, output=folder / "no" / "head.safetensors")))
    assert "is no folder" in line


def test_models_of_different_sizes_without_tokenizers_are_refused(source, folder, capsys):
    draft = tiny.save(folder / "other", "llama", vocab_size=80)
    line = refused(folder, capsys, train(**tokens(source, draft=draft)))
    assert "has a vocabulary of 96" in line
    assert "one of 80" in line


def test_different_tokenizers_are_refused_with_an_entry_that_differs(folder, capsys):
    draft = shutil.copytree(resolve("embedded:draft"), folder / "draft")
    tokenizer = AutoTokenizer.from_pretrained(draft)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    content = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[by_id[4000]], vocabulary[by_id[4001]] = 4001, 4000
    (draft / "tokenizer.json").write_text(json.dumps(content))
    line = refused(folder, capsys, train(draft=draft))
    assert "have different tokenizers: 4096 and 4096 entries, 2 with another id" in line
    assert "4000 in target, 4001 in draft" in line or "4001 in target, 4000 in draft" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "no/such/folder"}, "target='no/such/folder' does not exist"),
        ({"text__source": "missing.jsonl"}, "source=missing.jsonl: no such file"),
        ({"text__sequences": 100}, "holds 8 sequences of 16 tokens, fewer than the 102"),
        ({"drafter": "draft_model"}, "drafter=draft_model is wrong: expected specdec_pp"),
        ({"head": "medusa_9"}, "head=medusa_9 is wrong: expected one of"),
        ({"head__blocks": -1}, "blocks=-1 is wrong"),
        ({"epochs": 0}, "epochs=0 is wrong"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(source, draft, folder, capsys, changes, words):
    assert words in refused(folder, capsys, train(**tokens(source, draft=draft) | changes))


def test_ids_outside_the_vocabulary_are_refused(source, draft, folder, capsys):
    np.save(folder / "wide.npy", np.full((8, 16), 96))
    line = refused(folder, capsys, train(**tokens(source, draft=draft, text__source=folder / "wide.npy")))
    assert "token id 96, outside the model's vocabulary of 96" in line
