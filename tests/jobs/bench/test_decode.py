"""`hasten bench decode`, small: its tables, and that every way to decode gives generate's tokens."""

import json
import logging
import shutil

import pytest

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.bench import decode
from hasten.jobs.bench.decoding.setup import Setup
from hasten.jobs.common.schema import Tracking
from tests.decoding.drafters.heads.untrained import with_target_heads


def measured(tmp_path, **options):
    """Metrics of a run with two sequences in flight and without workers, all of whose files are in tmp_path."""
    config = decode.Config(
        **options,
        in_flight=2,
        shared=False,
        document=str(tmp_path / "benchmarks.md"),
        run_dir=str(tmp_path / "run"),
        tracking=Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )
    return json.loads(decode.run(config).read_text())["metrics"]


def test_tables_of_the_embedded_models(tmp_path):
    drafters = ["draft_model", "prompt_lookup"]
    metrics = measured(tmp_path, count=2, max_new_tokens=12, drafters=drafters, max_draft_tokens=4)
    ways = ("transformers_generate", "transformers_assisted", "hasten_plain", "draft_model", "prompt_lookup")
    assert [metrics[f"library.{way}.same"] for way in ways] == [2.0] * len(ways)
    assert {"in_flight.plain", "in_flight.prompt_lookup", "learning.aded"} <= metrics.keys()
    # What is drafted cannot make a pass give less than its own token, or more than the budget and one.
    lengths = [value for name, value in metrics.items() if name.startswith("sampled.")]
    assert len(lengths) == 6
    assert all(1 <= length <= 9 for length in lengths)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## decode: speculative decoding against transformers" in text
    assert "| prompt_lookup |" in text


@pytest.fixture
def foreign(tmp_path):
    """A target whose tokenizer is not the default draft's: two entries have each other's ids."""
    folder = shutil.copytree(resolve("embedded:draft"), tmp_path / "foreign")
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    one, other = list(ids)[300:302]
    ids[one], ids[other] = ids[other], ids[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_target_with_another_tokenizer_is_compared_without_the_drafters_of_the_default_draft(
    tmp_path, foreign, caplog
):
    with caplog.at_level(logging.INFO, "hasten.jobs.bench.decode"):
        metrics = measured(tmp_path, target=str(foreign), count=1, max_new_tokens=4, max_draft_tokens=2)
    compared = {name.split(".")[1] for name in metrics if name.endswith(".same")}
    assert {"transformers_generate", "hasten_plain", "prompt_lookup", "token_recycling", "union"} <= compared
    assert not {"transformers_assisted", "draft_model", "hierarchy", "specdec_pp"} & compared
    text = (tmp_path / "benchmarks.md").read_text()
    assert "Left out: draft_model, dyspec, hierarchy, rapid, rsd_beam, rsd_constant, s2d, specdec_pp, spectr (" in text
    assert "**library**: 1 prompts" in caplog.text, "the table is logged as soon as it is measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "embedded:target"}, "have different tokenizers"),
        ({"drafters": ["draft_model"]}, "drafters=draft_model cannot be compared: the default draft=embedded:draft"),
        ({"draft": None, "drafters": ["spectr"]}, "drafters=spectr cannot be compared: draft=null"),
    ],
)
def test_what_was_named_and_cannot_be_compared_is_refused(foreign, options, message):
    with pytest.raises(UserError, match=message):
        Setup(decode.Config(target=str(foreign), **options))


def test_a_draft_model_without_an_acceptance_head_leaves_out_specdec_pp(tmp_path):
    draft = shutil.copytree(resolve("embedded:draft"), tmp_path / "draft")
    (draft / "acceptance_head.safetensors").unlink()
    setup = Setup(decode.Config(draft=str(draft), count=1, max_draft_tokens=2, in_flight=2))
    assert "draft_model" in setup.names
    heads = {path.stem for path in with_target_heads()} - {"eagle"}  # which the embedded target has
    assert setup.omitted.keys() == {"specdec_pp"} | heads
    assert "there is no acceptance head at" in setup.omitted["specdec_pp"]
    assert any("specdec_pp (there is no acceptance head at" in line for line in setup.omissions())
    assert heads
    assert all("hasten train" in setup.omitted[head] for head in heads)
