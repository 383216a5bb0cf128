"""Sequences of whole documents."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hasten.accel.data.packing import pack, unpack
from hasten.accel.data.parts import Part
from hasten.accel.data.tokens import calibration_part, fingerprint, load_sample
from hasten.accel.errors import UserError
from tests.data.one_token_a_byte import one_token_a_byte

START = "<|start|>"
TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=one_token_a_byte(), bos_token=START)
    made.chat_template = TEMPLATE
    return made


def test_a_sequence_holds_documents_from_their_beginning_and_no_padding() -> None:
    documents = [np.full(size, number) for number, size in enumerate((3, 5, 2, 30, 4, 6))]
    packed = pack(documents, 5, 10, (99,), seed=1)
    assert packed.shape == (4, 2, 10)
    tokens, numbers = unpack(packed)
    for row, places in zip(tokens.tolist(), numbers.tolist(), strict=True):
        assert places[0] == 0
        assert {later - earlier for earlier, later in pairwise(places)} <= {0, 1}
        for place in set(places):
            piece = [token for token, at in zip(row, places, strict=True) if at == place]
            # Of the pieces of the long document, all but the first begin as a text does.
            (number,) = set(piece) - {99}
            assert piece[0] == number or (number == 3 and piece.index(3) == 1)
            if place < places[-1] and number != 3:
                assert len(piece) == (3, 5, 2, 30, 4, 6)[number]
    assert torch.equal(packed, pack(documents, 5, 10, (99,), seed=1))
    assert not torch.equal(packed, pack(documents, 5, 10, (99,), seed=2))
    assert len(pack(documents, 3, 10, (), seed=1)) == 3


def test_documents_of_conversations_are_those_of_the_template(tokenizer: Any, tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": json.dumps({"city": "Ulm"})}}
    record = {
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "no"},
        ],
    }
    texts = [{"text": f"text {number:02}"} for number in range(40)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, [record, *texts] * 20)))
    sample = load_sample(str(file), tokenizer, 12, 120, begin=(256,), packed=True)
    tokens, numbers = unpack(sample.tokens)
    pieces = {
        tokenizer.decode(row[places == place])
        for row, places in zip(tokens, numbers, strict=True)
        for place in places.unique()[:-1]
    }
    expected = "[weather]<user>Rain?<assistant>(weather Ulm)<tool>no"
    assert pieces == {expected, *(f"{START}text {number:02}" for number in range(40))}
    assert sample.readings[0].documents in range(400, 821)


def test_what_packs_too_few_sequences_and_what_has_no_documents_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(100)))
    with pytest.raises(UserError, match="100 documents of 600 tokens, which fill 50 of the 90 sequences of 10"):
        load_sample(str(file), tokenizer, 90, 10, packed=True)
    (tmp_path / "a.txt").write_text("abc" * 100)
    np.save(tmp_path / "a.npy", np.arange(100))
    for name in ("a.txt", "a.npy"):
        with pytest.raises(UserError, match=f"{name} has no documents"):
            load_sample(str(tmp_path / name), tokenizer, 1, 10, packed=True)


def test_a_packed_calibration_takes_the_part_that_it_needs(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": "x" * 90}) for _ in range(2000)))
    small, large = (calibration_part(str(file), tokenizer, count, 100, (), packed=True) for count in (10, 700))
    assert (small.calibration, large.calibration) == (5, 7)
    packed = load_sample(str(file), tokenizer, 4, 100, part=Part("calibration"), packed=True).tokens
    assert fingerprint(packed) != fingerprint(packed[:, 0])
