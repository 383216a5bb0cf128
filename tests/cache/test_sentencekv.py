"""SentenceKV: where sentences end, what a query retrieves by, which sentences it reads, and what is held."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache import cache as cache_module
from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod, Place, Recent
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.retrieve.sentencekv import SentenceKV, Sentences, numbered
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.sentences import sentence_ends
from hasten.accel.cache.sequence import NewTokens, SequenceCache
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.kernels.attention.contract import PLAIN
from tests.models import tiny

HEADS, SIZE = 2, 8
ENDS = (5, 9)


def mask(text):
    """Whether each letter ends a sentence: a full stop does."""
    return torch.tensor([letter == "." for letter in text])


def test_a_sentence_ends_with_its_full_stop_and_where_it_is_too_long():
    numbers, memory = numbered(mask("ab.c.defghi"), 4, 0, 0)
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert memory == (3, 6)


@pytest.mark.parametrize("split", range(14))
def test_numbering_goes_on_where_it_stopped(split):
    ends = mask("abcde.f.ghijk.")
    whole, state = numbered(ends, 3, 0, 0)
    first, middle = numbered(ends[:split], 3, 0, 0)
    second, end = numbered(ends[split:], 3, *middle)
    assert torch.cat([first, second]).equal(whole)
    assert end == state


def test_a_guide_is_the_mean_query_of_the_current_sentence():
    queries = torch.randn(6, HEADS * 2, SIZE, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    found = SentenceKV().guide(queries, seen, mask("ab.cd."))
    for row, (first, last) in enumerate([(0, 0), (0, 1), (0, 2), (3, 3), (3, 4), (3, 5)]):
        torch.testing.assert_close(found[row], queries[first : last + 1].mean(0))


class Recorder(SentenceKV):
    """Keeps the guides that it gives."""

    def guide(self, queries, seen, ends):
        found = super().guide(queries, seen, ends)
        guides.append(found)
        return found


guides: list[torch.Tensor] = []


def test_a_node_of_a_draft_tree_has_the_guide_that_it_has_without_drafts():
    generator = torch.Generator().manual_seed(1)
    method = Recorder(window=4, recent=2, sinks=1)
    ends = mask("ab.cdefg.hi")
    keys, values = (torch.randn(HEADS, 11, SIZE, generator=generator) for _ in range(2))
    queries = torch.randn(11, HEADS * 2, SIZE, generator=generator)

    def new(tokens, above=None):
        positions = torch.tensor(tokens, dtype=torch.int32)
        return NewTokens(keys[:, tokens], values[:, tokens], queries[tokens], positions, above, ends[tokens])

    def started():
        sequence = SequenceCache(method)
        sequence.append(new(list(range(6))), PLAIN, None, torch.float32)
        sequence.commit()
        sequence.keep(method.compress([], sequence.uncompressed(), Place(0, 1, 6, 3, PLAIN)))
        guides.clear()
        return sequence

    plain = started()
    for token in range(6, 11):
        plain.append(new([token]), PLAIN, None, torch.float32)
        plain.commit()
    expected = torch.cat(guides)
    drafted = started()
    # Nodes 0, 2, 3 and 5 are tokens 6 to 9; nodes 1 and 4 are drafts of other texts, which a full stop ends.
    wrong = [8, 8]
    tokens = [6, wrong[0], 7, 8, wrong[1], 9]
    above = torch.zeros(6, 6, dtype=torch.bool)
    for node, path in enumerate([[0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4], [0, 2, 3, 5]]):
        above[node, path] = True
    drafted.append(new(tokens[:3], above[:3, :3]), PLAIN, None, torch.float32)
    drafted.append(new(tokens[3:], above[3:]), PLAIN, None, torch.float32)
    torch.testing.assert_close(torch.cat(guides)[[0, 2, 3, 5]], expected[:4])
    drafted.commit([0, 2, 3, 5])
    drafted.append(new([10]), PLAIN, None, torch.float32)
    torch.testing.assert_close(guides[-1], expected[4:])


def sentences(budget, sinks=0):
    """Nine tokens in three sentences of two, four and three; the keys of one point in a direction of its own."""
    numbers = torch.tensor([3, 3, 4, 4, 4, 4, 8, 8, 8], dtype=torch.int32).expand(HEADS, -1)
    keys = torch.nn.functional.one_hot(numbers.long(), 9).float()
    keys[:, 2] *= 5
    positions = torch.arange(9, dtype=torch.int32).expand(HEADS, -1)
    return Sentences.of(keys, torch.randn(HEADS, 9, SIZE), positions, numbers, budget, sinks)


def test_sentences_are_read_whole_in_the_order_of_their_mean_keys_until_the_budget_is_met():
    guide = torch.zeros(1, HEADS * 2, 9)
    guide[..., 3], guide[..., 4], guide[..., 8] = 1.0, 1.5, 0.5
    found = sentences(7).asked(guide).choose(guide, PLAIN)[:, 0]
    assert found.tolist() == [[2, 3, 4, 5, 0, 1, 6]] * HEADS  # the mean key of four is 2
    first = sentences(7, sinks=1).asked(guide).choose(guide, PLAIN)[:, 0]
    assert first.tolist() == [[0, 2, 3, 4, 5, 1, 6]] * HEADS


def test_several_queries_read_what_each_reads_alone():
    segment = sentences(4)
    generator = torch.Generator().manual_seed(2)
    queries, given = (torch.randn(3, HEADS * 2, 9, generator=generator) for _ in range(2))
    positions = torch.arange(9, 12)
    together = segment.asked(given).attend(queries, positions, PLAIN)
    for row in range(3):
        part = slice(row, row + 1)
        alone = segment.asked(given[part]).attend(queries[part], positions[part], PLAIN)
        torch.testing.assert_close(together.o[part], alone.o)
    assert not torch.allclose(together.o, Dense.attend(segment, queries, positions, PLAIN).o)


def test_a_multiple_of_the_budget_is_held():
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(HEADS, 60, SIZE, generator=generator) for _ in range(2))
    queries = torch.randn(4, HEADS * 2, SIZE, generator=generator)
    given = Recent(keys, values, torch.arange(60, dtype=torch.int32), queries, ends=torch.zeros(60, dtype=torch.bool))
    method = SentenceKV(held=2, sinks=3, recent=4, window=4, kernel=1, longest=8)
    kept = method.compress([], given, Place(0, 1, 60, 10, PLAIN))
    (segment,) = kept.segments
    assert (segment.tokens + kept.recent, kept.recent, kept.memory) == (20, 4, (6, 56))
    assert (segment.positions[:, :3] == torch.arange(3)).all()
    # The tokens that SnapKV keeps, each in the sentence that it was in.
    assert torch.equal(segment.numbers, segment.positions // 8)


def test_ids_of_the_passes_tell_where_sentences_end_in_generate_and_under_the_engine(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "m", "llama", max_position_embeddings=1024)
    tokens = torch.randint(3, 12, (2, 40), generator=torch.Generator().manual_seed(4))
    ended = torch.isin(tokens, torch.tensor(ENDS))
    padding = torch.ones_like(tokens)
    padding[1, :7] = 0
    method, budget = SentenceKV(recent=4, window=4), CacheBudget(0.5)

    def model():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def numbers(found):
        return [sequence.segments[0].numbers[0].tolist() for layer in found.compressed for sequence in layer.sequences]

    own = model()
    attach(own)
    attach(own)
    found = CompressedCache(own, method, budget, ends=ENDS)
    own.generate(tokens, attention_mask=padding, past_key_values=found, max_new_tokens=2, do_sample=False)
    expected = [numbered(ended[0, :36], 64, 0, 0)[0].tolist(), numbered(ended[1, 7:36], 64, 0, 0)[0].tolist()]
    assert max(expected[0]) > 3
    assert numbers(found) == expected * len(found.layers)
    monkeypatch.setattr(cache_module, "sentence_ends", lambda _: torch.tensor(ENDS))
    target = CachedTarget(model(), method, budget)
    target.reserve(1, 64)
    target.prefill(0, tokens[0].tolist(), 16)
    target.end_prompt(0)
    assert numbers(target._compressed) == expected[:1] * len(found.layers)


def test_the_tokenizer_tells_which_ids_end_a_sentence():
    folder = resolve("embedded:target")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = set(sentence_ends(model).tolist())
    for text, expected in ((".", True), ("?", True), ("\n", True), (",", False), (" the", False)):
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        assert (token in ends) is expected, text


def test_a_model_without_a_tokenizer_has_sentences_of_one_length(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "m", "llama"))
    assert len(sentence_ends(model)) == 0


def test_on_the_trained_target_the_current_sentence_finds_better_ones_than_the_latest():
    class Latest(SentenceKV):
        def guide(self, queries, seen, ends):
            return torch.zeros(len(seen), *queries.shape[1:])  # of equal products the later sentence is read

    folder = resolve("embedded:target")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    attach(model)
    text = Path(torch.overrides.__file__).read_text()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids[:272]])

    def log_probs(method: CacheMethod, budget: int):
        found = CompressedCache(model, method, CacheBudget(budget))
        with torch.no_grad():
            model(tokens[:, :256], past_key_values=found, logits_to_keep=1)
            rows = [model(tokens[:, at : at + 1], past_key_values=found).logits for at in range(256, 272)]
        return torch.cat(rows, 1).log_softmax(-1)

    full = log_probs(SentenceKV(), 1000)
    found = [
        float((full.exp() * (full - log_probs(kind(sinks=4), 32))).sum(-1).mean()) for kind in (SentenceKV, Latest)
    ]
    assert found[0] < found[1]


@pytest.mark.parametrize("changes", [{"held": 0.5}, {"longest": 0}, {"kernel": 2}])
def test_a_wrong_value_is_named(changes):
    with pytest.raises(UserError, match=f"cache.{next(iter(changes))}={next(iter(changes.values()))}"):
        SentenceKV(**changes)
