"""Chat prompts of `hasten bench decode`: hasten's own or a file's, through the target's chat template."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.data.records import Conversation
from hasten.jobs.common.prompts import Prompt, check_lengths, encoded_prompt, read_prompts, read_records
from hasten.jobs.common.tokenizer import Tokenizer

OWN = "chat"
_OWN_FILE = Path(__file__).parents[1] / "prompts" / "chat.jsonl"
# Decoded first and not counted. It is in no file, so no drafter learns an answer from it that is asked for again.
_QUESTION = "Name three kinds of trees, and say where each of them grows."
_WARM_UP = Conversation([{"role": "user", "content": _QUESTION}], plain=(_QUESTION, ""))


@dataclass(frozen=True)
class ChatPrompts:
    """The chat prompts of a source, the categories in turns. warm_up: token ids of a prompt that is not counted.

    tokens, categories: of every prompt.
    """

    warm_up: list[int]
    tokens: list[list[int]]
    categories: list[str]

    @property
    def by_category(self) -> dict[str, list[int]]:
        """Indices of the prompts of each category."""
        indices: dict[str, list[int]] = {}
        for index, category in enumerate(self.categories):
            indices.setdefault(category, []).append(index)
        return indices


def is_conversations(source: str) -> bool:
    """Whether a source of prompts is hasten's own chat prompts or a file without `:FIELD`."""
    return source == OWN or Path(source).is_file()


def read_conversations(
    source: str, tokenizer: Tokenizer, vocabulary: int, per_category: int, max_new_tokens: int, context: int | None
) -> ChatPrompts:
    """The first prompts of each category of a source; records without `category` are of the category `all`.

    vocabulary, context: of the target, in tokens; None is no limit. UserError names a line that is no prompt, or one
    whose prompt is too long.
    """
    path = _OWN_FILE if source == OWN else Path(source)
    records = [record for _, record in read_records("prompts", path)]
    by_category: dict[str, list[Prompt]] = {}
    for record, prompt in zip(records, read_prompts(path, tokenizer, vocabulary, "prompt", "id"), strict=True):
        prompts = by_category.setdefault(str(record.get("category", "all")), [])
        if len(prompts) < per_category:
            prompts.append(prompt)
    # Sequences in flight are of all kinds, as a server's are.
    taken = list(_in_turns(by_category))
    check_lengths([prompt for _, prompt in taken], max_new_tokens, context)
    warm_up, _ = encoded_prompt(_WARM_UP, tokenizer, f"prompts={source}, the prompt that warms up", False)
    return ChatPrompts(warm_up, [prompt.tokens for _, prompt in taken], [category for category, _ in taken])


def _in_turns(by_category: dict[str, list[Prompt]]) -> Iterator[tuple[str, Prompt]]:
    rounds = itertools.zip_longest(*by_category.values())
    for prompts in rounds:
        yield from ((name, prompt) for name, prompt in zip(by_category, prompts, strict=True) if prompt is not None)
