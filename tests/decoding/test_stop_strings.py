"""Stop strings: where a completion ends does not depend on how its tokens arrive."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten.accel.decoding.detokenizer import Detokenizer
from hasten.accel.decoding.stop_strings import StopStrings
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from tests.data.one_token_a_byte import one_token_a_byte

TEXT = "def naïve(x):\n    return '€ 😀 日本'  # fin\n\n\nclass A:\n    pass\n"


def bytes_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=one_token_a_byte(), eos_token="<|end|>")


def sentence_pieces():
    """Words that begin with ▁, whose first space is left out, and a token for every byte."""
    words = ["▁def", "▁na", "ve", "▁return", "▁", "(", "x", ")", ":", "'", "#", "▁fin", "\n", "class", "▁A", "▁pass"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def ids_of(tokenizer, text):
    """Token ids of a text; sentence pieces are chosen here, since that tokenizer has no merges."""
    vocabulary = tokenizer.get_vocab()
    if "▁def" not in vocabulary:
        return tokenizer(text)["input_ids"]
    rest, ids = "▁" + text.replace(" ", "▁"), []
    while rest:
        word = max((word for word in vocabulary if rest.startswith(word)), key=len, default=None)
        ids += [vocabulary[word]] if word else list(rest[0].encode())
        rest = rest[len(word or rest[0]) :]
    return ids


@pytest.fixture(scope="module", params=["embedded", "bytes", "pieces"])
def tokenizer(request):
    makers = {"bytes": bytes_tokenizer, "pieces": sentence_pieces}
    if request.param == "embedded":
        return AutoTokenizer.from_pretrained(resolve("embedded:target"))
    return makers[request.param]()


def shares(ids, seed):
    """The ids in parts of 1 to 9."""
    drawn, parts = random.Random(seed), []
    while ids:
        count = drawn.randint(1, 9)
        parts.append(ids[:count])
        ids = ids[count:]
    return parts


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_text_of_all_tokens(tokenizer, seed):
    ids = ids_of(tokenizer, TEXT)
    end = tokenizer.eos_token_id
    ids[5:5] = [end] * 6
    text = Detokenizer(tokenizer)
    assert (
        "".join(text.add(part) for part in shares(ids, seed)) == TEXT == tokenizer.decode(ids, skip_special_tokens=True)
    )


def test_half_a_character_waits_for_its_other_half():
    tokenizer = bytes_tokenizer()
    text = Detokenizer(tokenizer)
    assert [text.add([token]) for token in ids_of(tokenizer, "a€b")] == ["a", "", "", "€", "b"]


def test_bytes_that_are_no_text_do_not_hide_what_follows():
    tokenizer = bytes_tokenizer()
    ids = ids_of(tokenizer, "€")[:1] * 200 + ids_of(tokenizer, "€end")
    for seed in range(5):
        text = Detokenizer(tokenizer)
        joined = "".join(text.add(part) for part in shares(ids, seed))
        assert joined == tokenizer.decode(ids)
        assert joined.endswith("€end")


def first_stop(tokenizer, ids, strings):
    """Number of tokens after which the text of all of them holds a stop string."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if any(string in text for string in strings):
            return count
    return None


@pytest.mark.parametrize(
    "strings",
    [
        ["e"],
        ["return"],
        ["n '"],
        ["€"],
        ["😀 日"],
        ["本'  #"],
        ["\n\n"],
        ["\n\n\nclass"],
        ["none of it"],
        ["x)", "ve(x"],
        [TEXT],
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_completion_ends_at_the_first_token_that_completes_a_stop_string(tokenizer, strings, seed):
    ids = ids_of(tokenizer, TEXT)
    stop = StopStrings(tuple(strings), tokenizer)
    matcher, done = stop.start(), 0
    for part in shares(ids, seed):
        count = matcher.add(part)
        if count is not None:
            done += count
            break
        done += len(part)
    expected = first_stop(tokenizer, ids, strings)
    assert done == (expected or len(ids))
    assert (matcher.matched is None) == (expected is None)
    text = tokenizer.decode(ids[:done])
    assert stop.cut(text) == min((TEXT.split(string)[0] for string in strings), key=len)
    assert matcher.matched is None or text.startswith(stop.cut(text) + matcher.matched)


def test_special_tokens_are_no_part_of_the_text(tokenizer):
    stop = StopStrings((tokenizer.eos_token,), tokenizer)
    assert stop.start().add([tokenizer.eos_token_id]) is None


def test_the_beginning_of_a_stop_string_is_held_back():
    stop = StopStrings(("END", "###\n"), None)
    assert [stop.held_back(text) for text in ("", "abc", "abE", "abEN", "a#", "###", "EN#")] == [0, 0, 1, 2, 1, 3, 1]
    assert stop.cut("a###\nbENDc") == "a"
    assert StopStrings((), None).cut("abc") == "abc"


@pytest.mark.parametrize("string", ["", "a\ufffd"])
def test_a_stop_string_without_text_is_refused(string):
    with pytest.raises(UserError, match="expected text of one character or more"):
        StopStrings((string,), None)
