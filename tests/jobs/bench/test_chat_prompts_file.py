"""The chat prompts of `hasten bench decode`: 25 conversations of each kind of Spec-Bench, no two of them alike."""

import itertools
import json
from collections import Counter
from pathlib import Path

import hasten.jobs.bench

FILE = Path(hasten.jobs.bench.__file__).parent / "prompts" / "chat.jsonl"
CATEGORIES = (
    *("writing", "reasoning", "mathematics", "code"),
    *("extraction", "summaries", "translation", "retrieval"),
)
RECORDS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def words(record):
    return [word for message in record["messages"] for word in message["content"].split()]


def test_25_prompts_of_each_category_with_ids_of_their_own():
    assert Counter(record["category"] for record in RECORDS) == dict.fromkeys(CATEGORIES, 25)
    assert len({record["id"] for record in RECORDS}) == 200


def test_roles_alternate_after_an_optional_system_message_and_the_user_speaks_last():
    for record in RECORDS:
        roles = [message["role"] for message in record["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == [*["user", "assistant"] * (len(turns) // 2), "user"], record["id"]
        assert all(message["content"].strip() for message in record["messages"]), record["id"]


def test_summaries_and_retrieval_bring_a_passage():
    for record in RECORDS:
        if record["category"] in ("summaries", "retrieval"):
            assert 120 <= len(words(record)) <= 450, record["id"]


def test_no_prompt_is_another_one_with_some_words_replaced():
    shingles = {
        record["id"]: set(itertools.pairwise(word.lower() for word in words(record)))  # pairs of adjacent words
        for record in RECORDS
    }
    for (one, pairs), (other, other_pairs) in itertools.combinations(shingles.items(), 2):
        overlap = len(pairs & other_pairs) / min(len(pairs), len(other_pairs))
        assert overlap < 0.35, (one, other, overlap)
