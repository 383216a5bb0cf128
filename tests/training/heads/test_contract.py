"""What every head of `hasten train_drafter` must do, on the embedded models."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.base import Head, HeadModels
from hasten.jobs.cli.methods import method, method_names
from hasten.jobs.common.tokenizer import load_tokenizer

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[3] / "conf" / "head").glob("*.yaml"))
    if isinstance(instantiate(OmegaConf.load(path)), Head)
]
SEQUENCES, LENGTH = 4, 32


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def head(request):
    return replace(instantiate(OmegaConf.load(request.param)), epochs=1)


@pytest.fixture(scope="module")
def models():
    loaded = [AutoModelForCausalLM.from_pretrained(resolve(f"embedded:{name}")).eval() for name in ("target", "draft")]
    return HeadModels(*loaded)


@pytest.fixture(scope="module")
def collect(head, models):
    tokens = load_tokens("library", load_tokenizer(resolve("embedded:target")), SEQUENCES, LENGTH, "train", 0, 4096)
    given = models if head.needs_draft_model else HeadModels(models.target)

    def collected(progress=lambda done: None, batch=3):
        return head.collect(given, tokens, torch.Generator().manual_seed(0), batch, progress)

    return collected


@pytest.fixture(scope="module")
def network(head, collect):
    return head.fit(collect(), seed=3)


def weights(network):
    return {name: tensor.float() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_drafter_of_a_head_exists_and_takes_its_file(head):
    assert head.drafter in method_names("drafter")
    assert "head" in {field.name for field in method("drafter", head.drafter).fields}


def test_examples_are_as_many_as_the_head_says_and_progress_reaches_the_last_window(head, collect):
    done = []
    examples = collect(done.append)
    assert done[-1] == SEQUENCES
    assert done == sorted(done)
    # At most one example for each token, fewer where a share is left out at random.
    expected = SEQUENCES * LENGTH * head.examples_per_token
    assert 0.75 * expected < len(examples) <= SEQUENCES * LENGTH


def test_a_step_is_reported_for_each_that_was_announced_and_training_repeats_itself_from_its_seed(
    head, collect, network
):
    examples, steps = collect(), []
    again = head.fit(examples, seed=3, report=lambda step, loss: steps.append(step))
    assert steps == list(range(1, head.steps(len(examples)) + 1))
    assert same(weights(again), weights(network))
    assert not same(weights(head.fit(examples, seed=4)), weights(network))


def test_training_leaves_the_random_numbers_of_others_alone(head, collect):
    examples = collect()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    head.fit(examples, seed=3)
    assert torch.equal(torch.rand(1), expected)


def test_the_network_has_the_parameters_that_a_dry_run_counts(head, models, network):
    width = getattr(models, head.reads).config.hidden_size
    assert sum(parameter.numel() for parameter in network.parameters()) == head.parameters(width)


def test_quality_has_a_loss_and_numbers_only_and_a_summary(head, collect, network):
    quality = head.measure(network, collect())
    metrics = quality.metrics()
    assert metrics["loss"] >= 0
    assert all(isinstance(value, float) for value in metrics.values())
    assert all(
        isinstance(value, (int, float)) for rows in quality.tables().values() for row in rows for value in row.values()
    )
    assert quality.summary()
    assert "\n" not in "".join(quality.summary())


def test_a_stored_network_is_the_same_up_to_bfloat16_and_for_its_model_alone(head, network, tmp_path):
    path = tmp_path / head.file
    head.save(network, path, "one")
    loaded = weights(head.load(path, "one"))
    for name, tensor in weights(network).items():
        torch.testing.assert_close(loaded[name], tensor, rtol=2**-8, atol=0)  # half a unit in the last place
    assert head.load(path) is not None  # of an unknown model
    with pytest.raises(UserError):
        head.load(path, "other")
    path.write_bytes(b"no head")
    with pytest.raises(UserError):
        head.load(path)


def test_a_head_is_pickled(head):
    assert pickle.loads(pickle.dumps(head)) == head
