"""`hasten decode` with a head on the target: its options, and what is refused before anything is started."""

import json

import pytest

from hasten.jobs.cli.main import main
from hasten.jobs.cli.methods import method
from tests.decoding.drafters.heads.untrained import draft_heads, save_untrained


def decode(folder, output, *words):
    """Exit code of decoding one prompt."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "def total(values):\n    result = 0\n"}) + "\n")
    options = ["prompts=prompts.jsonl", f"output={output}", "max_new_tokens=12", "workers=1"]
    return main(["decode", *options, *words])


def tokens(path):
    return json.loads(path.read_text())["token_ids"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_is_given_by_its_folder_and_changes_no_token(folder, ray_session):
    save_untrained(draft_heads()["medusa"], folder / "head")
    assert decode(folder, "plain.jsonl", "draft_length=fixed", "draft_length.tokens=0") == 0
    drafting = ["draft_length=fixed", "draft_length.tokens=4", "drafter=medusa", "drafter.head=head"]
    assert decode(folder, "drafted.jsonl", *drafting) == 0
    assert tokens(folder / "drafted.jsonl") == tokens(folder / "plain.jsonl")


@pytest.mark.parametrize(
    ("drafter", "message"),
    [("medusa", "there is no trained head at"), ("eagle", "is a head of medusa: expected one of eagle")],
    ids=["none", "of another drafter"],
)
def test_a_head_that_does_not_fit_is_refused_before_anything_is_started(folder, capsys, drafter, message):
    words = [f"drafter={drafter}"]
    if drafter == "eagle":
        words.append(f"drafter.head={save_untrained(draft_heads()['medusa'], folder / 'head')}")
    assert decode(folder, "out.jsonl", *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_hyper_parameters_of_a_base_class_are_options():
    fields = {field.name: field.default for field in method("drafter", "medusa").fields}
    assert fields == {"head": None, "tree": "dynamic", "branches": 4, "width": 4, "depth": 0, "min_reach": 0.2}
    # A class of another module, with fields of its own and another default.
    names = [field.name for field in method("head", "fspad").fields]
    assert names[:2] == [field.name for field in method("head", "eagle").fields][:2]
    assert names[-1] == "alignment"
