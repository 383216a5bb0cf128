"""The acceptance head and its training, on numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.accel.training.heads.acceptance_training import AcceptanceTraining, Examples, auc
from hasten.accel.training.heads.base import HeadModels
from hasten.accel.training.heads.fitting import Fitting


class Model:
    """A causal LM that says the same after every token; its hidden state is the token, one-hot."""

    def __init__(self, probs):
        self.device = torch.device("cpu")
        self._logits = torch.tensor(probs).log()

    def __call__(self, input_ids, use_cache, output_hidden_states=False):
        hidden = torch.nn.functional.one_hot(input_ids, len(self._logits)).float()
        return SimpleNamespace(logits=self._logits.expand(*input_ids.shape, -1), hidden_states=(None, hidden))


def test_each_block_has_its_own_weights():
    head = AcceptanceHead(4, blocks=3)
    assert sum(parameter.numel() for parameter in head.parameters()) == 3 * (16 + 4) + 2 * 4 + 2
    assert len({block.linear.weight.data_ptr() for block in head.blocks}) == 3


def test_blocks_add_to_what_they_are_given():
    head = AcceptanceHead(1, blocks=2)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.blocks[0].linear.bias.data.fill_(2.0)
    head.out.weight.data[:, 0] = torch.tensor([-1.0, 0.5])
    changed = 3.0 + 2.0 * torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(head.accepts(torch.tensor([[3.0]])), (1.5 * changed).sigmoid()[None])


def test_a_saved_head_says_the_same_up_to_its_bfloat16(tmp_path):
    torch.manual_seed(0)
    head = AcceptanceHead(8)
    head.save(tmp_path / FILE, "fingerprint")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    loaded = AcceptanceHead.load(tmp_path / FILE)
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    again = tmp_path / "again.safetensors"
    loaded.save(again, "fingerprint")
    assert again.read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize("content", [b"", b"not a head"])
def test_a_file_that_is_no_head_is_refused(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match="is not an acceptance head"):
        AcceptanceHead.load(tmp_path / FILE)


def test_another_safetensors_file_is_refused():
    with pytest.raises(UserError, match="is not an acceptance head"):
        AcceptanceHead.load(resolve("embedded:draft") / "model.safetensors")


def test_the_embedded_draft_comes_with_a_small_head_for_its_width():
    path = resolve("embedded:draft") / FILE
    assert AcceptanceHead.load(path).hidden_size == 128
    assert path.stat().st_size < 400_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def test_the_loss_weighs_rejections_and_divides_by_the_mass_of_its_weights():
    # Logits whose softmax is (1/4, 3/4) and (1/2, 1/2); acceptance 1 and 1/2.
    logits = torch.tensor([[0.0, torch.tensor(3.0).log()], [0.0, 0.0]])
    expected = (torch.tensor(4 / 3).log() + (0.5 + 6 * 0.5) * torch.tensor(2.0).log()) / (1 + 0.5 + 6 * 0.5)
    torch.testing.assert_close(AcceptanceTraining().loss(logits, torch.tensor([1.0, 0.5])), expected)


def test_what_minimises_the_loss_is_the_acceptance_once_the_weight_is_taken_out():
    training = AcceptanceTraining(reject_weight=6)
    accepted = torch.tensor(0.7)
    best = (accepted / (accepted + 6 * (1 - accepted))).requires_grad_()
    training.loss(torch.stack([1 - best, best])[None].log(), accepted[None]).backward()
    torch.testing.assert_close(best.grad, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(training.unweighted(best.detach()), accepted)


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    fitting = Fitting(epochs=1, lr=1.0, batch=1, warmup=0.2)
    rates = [fitting.rate(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_only_drafted_tokens_are_examples_and_their_labels_are_their_acceptance():
    target, draft = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    tokens = torch.randint(3, (20, 50), generator=torch.Generator().manual_seed(0))
    # 980 places, of which 85 % are drawn: 833 expected, with a deviation of 11.
    models = HeadModels(Model(target), Model(draft))
    found = AcceptanceTraining().collect(models, tokens, torch.Generator().manual_seed(0))
    assert 790 < len(found) < 876
    drawn = found.hidden.argmax(-1)
    torch.testing.assert_close(found.labels, torch.tensor([1.0, 1.0, 1 / 3])[drawn])
    # The draft draws the last of the three 60 % of the time, the text a third.
    assert 0.55 < (drawn == 2).float().mean() < 0.65


def test_without_mixing_every_token_that_has_one_before_it_is_drafted():
    tokens = torch.zeros(3, 7, dtype=torch.long)
    model = Model([0.5, 0.5])
    found = AcceptanceTraining(mixing=0).collect(HeadModels(model, model), tokens, torch.Generator(), batch=2)
    assert torch.equal(found.labels, torch.ones(18))


def test_training_finds_out_what_the_hidden_state_tells_and_repeats_itself_from_its_seed():
    kinds = torch.arange(2000) % 2
    examples = Examples(torch.nn.functional.one_hot(kinds, 4).bfloat16(), torch.tensor([0.9, 0.2])[kinds])
    training = AcceptanceTraining(lr=1e-2, batch=50)
    losses = []
    head = training.fit(examples, seed=1, report=lambda step, loss: losses.append(loss))
    assert len(losses) == training.steps(2000) == 120
    again = training.fit(examples, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(head.parameters(), again.parameters(), strict=True))
    quality = training.measure(head, examples)
    assert [row["tokens"] for row in quality.calibration] == [1000, 1000]
    for row, accepted in zip(quality.calibration, (0.2, 0.9), strict=True):
        assert row["accepted"] == pytest.approx(accepted)
        assert row["unweighted"] == pytest.approx(accepted, abs=0.02)  # what is left after 120 steps
    # Both kinds hold 1000 rows: the order is right for 0.9 * 0.8 of the pairs and wrong for 0.1 * 0.2.
    assert quality.auc == pytest.approx((0.72 + (0.9 * 0.1 + 0.2 * 0.8) / 2) / (1.1 * 0.9))


def test_auc_counts_pairs_in_order_and_half_of_the_equal_ones():
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert auc(torch.tensor([0.9, 0.1, 0.8, 0.2]), labels) == 1
    assert auc(torch.tensor([0.9, 0.9, 0.1, 0.5]), labels) == (0.5 + 1 + 0 + 0) / 4
    assert torch.tensor(auc(torch.tensor([0.1, 0.2]), torch.ones(2))).isnan()


@pytest.mark.parametrize("wrong", [{"mixing": 1.0}, {"epochs": 0}, {"lr": 0.0}, {"reject_weight": 0.0}, {"batch": 0}])
def test_a_wrong_hyper_parameter_is_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value} is wrong"):
        AcceptanceTraining(**wrong)


def test_a_head_of_another_draft_model_is_refused(tmp_path):
    AcceptanceHead(8).save(tmp_path / "head.safetensors", draft="one")
    AcceptanceHead.load(tmp_path / "head.safetensors", "one")
    with pytest.raises(UserError, match="was trained for another draft model"):
        AcceptanceHead.load(tmp_path / "head.safetensors", "other")
