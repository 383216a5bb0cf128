"""What every draft head must do: above all, drafts in use are those of training."""

import pickle

import pytest
import torch

from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import HeadBatch, TargetFacts, adopt_weights, load_head
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from tests.decoding.drafters.heads.untrained import draft_heads, network_of, vocabulary

FACTS = TargetFacts.of(resolve("embedded:target"))
LENGTH, TOP = 12, 5


@pytest.fixture(scope="module", params=sorted(draft_heads()))
def head(request):
    return draft_heads()[request.param]


@pytest.fixture(scope="module")
def network(head):
    return network_of(head).eval()


def batch_of(head, documents=((LENGTH,), (LENGTH,)), seed=0):
    """Random windows; documents: lengths of the documents of each window."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(documents), sum(documents[0])
    width = len(head.layers(FACTS)) * FACTS.hidden_size
    segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in documents])
    return HeadBatch(
        torch.randint(0, FACTS.vocabulary, shape, generator=generator),
        torch.randn(*shape, width, generator=generator),
        torch.stack([torch.randperm(1000, generator=generator)[:TOP] for _ in range(shape[0] * shape[1])]).view(
            *shape, TOP
        ),
        torch.full((*shape, TOP), 1 / TOP).log(),
        torch.ones(shape, dtype=torch.bool),
        segments,
        positions,
    )


def used(network, batch, row, last):
    """Logits of each depth along the text, as in decoding: the tokens up to `last` are read in two parts."""
    state, drafts = network.begin(), []
    tokens = batch.next_tokens()[row]
    with torch.no_grad():
        if last:
            network.read([state], [batch.features[row, :last]], [tokens[:last]])
        frontier = network.read([state], [batch.features[row, last : last + 1]], [tokens[last : last + 1]])
        drafts.append(frontier.logits[0])
        while frontier.depth < network.max_depth and last + 1 + frontier.depth < batch.tokens.shape[1] - 1:
            drafted = batch.tokens[row, last + 1 + frontier.depth]
            frontier = network.step([state], frontier, torch.tensor([0]), drafted[None])
            drafts.append(frontier.logits[0])
    return drafts


@pytest.mark.parametrize("last", [0, 3, 7])
def test_drafts_in_use_are_those_of_training(head, network, last):
    batch = batch_of(head)
    with torch.no_grad():
        trained = head.teacher_forced(network, batch)
    assert len(trained) == network.max_depth
    for depth, logits in enumerate(used(network, batch, 1, last)):
        # float32 sums in another order.
        torch.testing.assert_close(logits, trained[depth][1, last], rtol=1e-3, atol=1e-3)


def test_a_document_does_not_see_the_one_before_it_in_its_window(head, network):
    packed = batch_of(head, ((5, LENGTH), (5, LENGTH)))
    alone = HeadBatch(**{name: value[:, 5:] for name, value in vars(packed).items()})
    with torch.no_grad():
        for together, single in zip(
            head.teacher_forced(network, packed), head.teacher_forced(network, alone), strict=True
        ):
            torch.testing.assert_close(together[:, 5:], single, rtol=1e-3, atol=1e-3)


def losses_of_steps(head, network, batch, steps):
    """Loss of each step on one batch, whose gradient reaches every parameter."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = head.loss(network, batch)
        optimizer.zero_grad()
        loss.value.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(float(loss.value.detach()))
        assert all(0 <= float(value) <= 1 for name, value in loss.parts.items() if name.startswith("accuracy"))
    return losses


def test_training_lowers_the_loss_and_reaches_every_parameter(head):
    losses = losses_of_steps(head, network_of(head, seed=1), batch_of(head), 8)
    assert losses[-1] < 0.9 * losses[0]


def test_tokens_that_are_not_learned_change_no_loss(head, network):
    batch = batch_of(head)
    learned = batch.learned.clone()
    learned[:, 6:] = False
    with torch.no_grad():
        other = batch.top_ids.clone()
        other[:, 6:] = other[:, 6:].flip(-1) + 1  # what the target says after token 5 or later is about later tokens
        one = head.loss(network, HeadBatch(**{**vars(batch), "learned": learned})).value
        two = head.loss(network, HeadBatch(**{**vars(batch), "learned": learned, "top_ids": other})).value
    assert torch.equal(one, two)


def test_a_stored_head_is_the_same_up_to_bfloat16(head, network, tmp_path):
    head.save(network, tmp_path, FACTS, {})
    again, loaded, config = load_head(tmp_path, type(head), FACTS)
    assert again == head
    assert config["head"] == head.drafter
    assert torch.equal(loaded.vocabulary.ids, vocabulary(FACTS).ids)
    expected = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=1e-30)  # half a unit in the last place


def held_bytes(state):
    """Bytes of the tensors of a state, and of what it is made of."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state if isinstance(state, list | tuple) else vars(state).values() if hasattr(state, "__dict__") else ()
    return sum(held_bytes(part) for part in parts)


@pytest.mark.parametrize("tokens", [5, 70])
def test_a_state_takes_no_more_bytes_than_it_says(head, network, tokens):
    state = network.begin()
    width = len(head.layers(FACTS)) * FACTS.hidden_size
    with torch.no_grad():
        for _ in range(tokens):
            network.read([state], [torch.zeros(1, width)], [torch.zeros(1, dtype=torch.long)])
    assert (state is None) == (network.state_bytes(tokens) == 0)
    assert held_bytes(state) <= network.state_bytes(tokens) <= 8 * max(1, held_bytes(state))


def test_a_head_is_pickled(head):
    assert pickle.loads(pickle.dumps(head)) == head


def test_weights_of_another_vocabulary_are_adopted_row_by_row(head, network):
    ids = network.vocabulary.ids
    if len(ids) == network.vocabulary.size:
        pytest.skip("a head of all ids has one vocabulary")
    fresh = head.build(FACTS, DraftVocabulary(torch.cat([ids[:5], ids[-1:] + 1]), FACTS.vocabulary))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    adopt_weights(fresh, network)
    for name, tensor in network.state_dict().items():
        if name.split(".")[0] in ("output", "outputs"):
            assert torch.equal(fresh.state_dict()[name][:5], tensor[:5])
            assert torch.equal(fresh.state_dict()[name][5], before[name][5]), "an id that the other lacks"
        else:
            assert torch.equal(fresh.state_dict()[name], tensor)


def test_weights_of_other_sizes_are_not_adopted():
    head = draft_heads()["eagle"]
    other = type(head)(intermediate_size=64)
    with pytest.raises(ValueError, match="mlp"):
        adopt_weights(other.build(FACTS, network_of(head).vocabulary), network_of(head))
