import json
import shutil

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.common.prompts import (
    check_lengths,
    check_tokenizers,
    load_learned,
    read_prompts,
    read_recorded,
    save_learned,
    stop_ids,
)
from hasten.jobs.common.tokenizer import load_tokenizer

DRAFTER = {"_target_": "hasten.accel.decoding.drafters.retrieval.aded.Aded"}


def read(path, content):
    """Keys and tokens of a file of prompts."""
    path.write_bytes(content)
    return {each.key: each.tokens for each in read_prompts(path, None, 9, "prompt", "id")}


def test_files_with_a_byte_order_mark_and_crlf_are_read(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": [1]}\r\n\r\n{"prompt": [2], "id": "\xc3\xa9"}\r\n'
    assert read(tmp_path / "prompts.jsonl", content) == {"1": [1], "é": [2]}


def test_names_of_special_tokens_are_text_unless_asked_for(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x<|endoftext|>"}\n{"instruction": "y<|endoftext|>", "output": "z"}\n')
    tokenizer = load_tokenizer(resolve("embedded:target"))
    end = tokenizer.eos_token_id
    found = [read_prompts(path, tokenizer, 4096, "prompt", "id", special) for special in (False, True)]
    assert [[prompt.tokens.count(end) for prompt in prompts] for prompts in found] == [[0, 0], [1, 1]]
    assert [tokenizer.decode(prompt.tokens) for prompt in found[0]] == ["x<|endoftext|>", "y<|endoftext|>\n"]
    assert [prompt.is_chat for prompt in found[0]] == [False, False]


def test_contexts_stand_between_the_prefix_and_the_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    record = {"prefix": "Read", "contexts": ["one two", [5, 6, 7], "x"], "prompt": "y"}
    path.write_text(json.dumps(record) + '\n{"prompt": [3], "contexts": [[4]]}\n')
    tokenizer = load_tokenizer(resolve("embedded:target"))
    whole, plain = read_prompts(path, tokenizer, 4096, "prompt", "id", contexts=True)
    assert (plain.tokens, plain.contexts) == ([4, 3], (0, 1))
    parts = [
        tokenizer(part).input_ids if isinstance(part, str) else part for part in ("Read", *record["contexts"], "y")
    ]
    assert whole.tokens == [token for part in parts for token in part]
    starts = [sum(map(len, parts[:count])) for count in range(1, 5)]
    assert whole.contexts == tuple(starts)
    # All contexts begin at one position, so that the text may be longer than the model's context.
    longest = max(map(len, parts[1:4]))
    needed = len(parts[0]) + longest + len(parts[4])
    check_lengths([whole], 8, needed + 8)
    with pytest.raises(UserError, match=f"has {needed} tokens"):
        check_lengths([whole], 8, needed + 7)
    # Without a cache that reads contexts, they are a field like any other.
    assert read_prompts(path, tokenizer, 4096, "prompt", "id")[1].tokens == [3]


def test_a_tokenizer_s_first_token_stands_before_all_contexts_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"contexts": [[1, 5], [1, 6]], "prompt": [1, 7]}')

    def tokenizer(text, add_special_tokens=True, **_):
        return {"input_ids": [1, 3] if add_special_tokens else [3]}

    (found,) = read_prompts(path, tokenizer, 9, "prompt", "id", contexts=True)
    assert (found.tokens, found.contexts) == ([1, 5, 6, 7], (1, 2, 3))


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"prompt": [1]}, "line 1 has no list of 'contexts'"),
        ({"prompt": [1], "contexts": []}, "line 1 has no list of 'contexts'"),
        ({"prompt": [1], "contexts": [[]]}, "line 1 has an empty context"),
        ({"prompt": [1], "contexts": ["text"]}, "line 1 has 'contexts' of something else"),
        ({"prompt": [1], "contexts": [[9]]}, "token id 9"),
    ],
)
def test_wrong_contexts_are_refused(tmp_path, record, wrong):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=wrong):
        read_prompts(path, None, 9, "prompt", "id", contexts=True)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {0: "the tokenizer", 5: "generation", 6: "generation"}),
        ({"eos_token_id": 0}, {}, {0: "generation"}),
        ({}, {"eos_token_id": 7}, {0: "the tokenizer", 7: "config"}),
        (None, {"eos_token_id": None}, {0: "the tokenizer"}),
    ],
)
def test_a_models_end_tokens_are_those_of_its_files_and_of_its_tokenizer(tmp_path, generation, config, expected):
    names = {"generation": "generation_config.json", "config": "config.json"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(resolve("embedded:target"))
    assert stop_ids(tmp_path, tokenizer) == {index: names.get(place, place) for index, place in expected.items()}


def test_half_a_character_is_refused_and_a_pair_is_one(tmp_path):
    path = tmp_path / "prompts.jsonl"
    assert read(path, b'{"prompt": [1], "id": "\\ud83d\\ude00"}\n') == {"\U0001f600": [1]}
    with pytest.raises(UserError, match="line 1 holds half a character"):
        read(path, b'{"prompt": [1], "id": "\\uD83D"}\n')


def test_a_recording_without_a_prompt_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt_token_ids": [], "token_ids": [1, 2]}) + "\n")
    with pytest.raises(UserError, match="line 1 has no prompt_token_ids"):
        read_recorded(path, 9)


def test_a_memory_of_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    save_learned(path, DRAFTER, 9, {"tokens": torch.arange(3)})
    assert load_learned(path, DRAFTER, 9)["tokens"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="from a target with a vocabulary of 9, and this one has 8"):
        load_learned(path, DRAFTER, 8)


def test_every_end_id_of_a_list_ends_a_completion(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert set(stop_ids(tmp_path, None)) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert set(stop_ids(tmp_path, None)) == {2, 5}


@pytest.mark.parametrize("padded", ["target", "draft"])
def test_a_vocabulary_that_is_padded_on_either_side_fits(tmp_path, padded):
    folders = {name: shutil.copytree(resolve("embedded:draft"), tmp_path / name) for name in ("target", "draft")}
    config = json.loads((folders[padded] / "config.json").read_text())
    config["vocab_size"] += 64
    (folders[padded] / "config.json").write_text(json.dumps(config))
    check_tokenizers(folders["target"], folders["draft"])
    for folder in folders.values():
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has a vocabulary of .* give a draft model with the target's tokenizer"):
        check_tokenizers(folders["target"], folders["draft"])
