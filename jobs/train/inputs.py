"""The sequences of `hasten train`: texts, conversations with a mask of their answers, and prompts to be answered."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.data.chat import encode_conversation
from hasten.accel.data.documents import LIBRARY
from hasten.accel.data.records import Conversation, read_document, read_prompt
from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.jobs.common.prompts import encoded_prompt, read_records
from hasten.jobs.common.tokenizer import Tokenizer

_SUFFIXES = (".jsonl", ".txt", ".md")


@dataclass(frozen=True)
class TrainingText:
    """tokens: ids. learned: which of them a head learns; None for a prompt that the target is to answer."""

    tokens: list[int]
    learned: list[bool] | None


@dataclass(frozen=True)
class Reading:
    """How sources are read. prompt_length: of a plain text that is to be continued; 0 leaves texts as they are."""

    tokenizer: Tokenizer | None
    vocabulary: int
    begin: tuple[int, ...]
    sequence_length: int
    generate: bool
    prompt_length: int
    seed: int = 0

    def library(self, split: str, count: int) -> list[TrainingText]:
        """Windows of the standard library's files."""
        length = self.prompt_length if self.generate and self.prompt_length else self.sequence_length
        rows = load_tokens(LIBRARY, self.tokenizer, count, length, split, self.seed, self.vocabulary, begin=self.begin)
        return [self._text(row) for row in rows.tolist()]

    def files(self, option: str, paths: Sequence[str], count: int) -> list[TrainingText]:
        """The first `count` sequences of files; UserError for a file that has none."""
        found: list[TrainingText] = []
        for name in paths:
            path = Path(name)
            if path.suffix not in _SUFFIXES or not path.is_file():
                raise UserError(f"{option}={name} is wrong: expected library, or a file of {', '.join(_SUFFIXES)}")
            before = len(found)
            if path.suffix == ".jsonl":
                for number, record in read_records(option, path):
                    found += self._record(record, f"{option}={path}, line {number}")
                    if len(found) >= count:
                        break
            else:
                found += self._texts(path.read_text(encoding="utf-8-sig"), f"{option}={path}")
            if len(found) == before:
                raise UserError(f"{option}={path} holds no answer or text: give data.generate=true to answer prompts")
        return found[:count]

    def _record(self, record: dict[str, object], where: str) -> list[TrainingText]:
        if "text" in record:
            document = read_document(record, where)
            assert isinstance(document, str)
            return self._texts(document, where)
        if self.generate:
            prompt = read_prompt(record, where)
            ids = prompt if isinstance(prompt, list) else encoded_prompt(prompt, self._needed(where), where, False)[0]
            return [TrainingText(ids, None)] if len(ids) < self.sequence_length else []
        document = read_document(record, where)
        if isinstance(document, str):
            raise UserError(f"{where} has no answer: give records with answers, or data.generate=true")
        return self._conversation(document, where)

    def _conversation(self, conversation: Conversation, where: str) -> list[TrainingText]:
        """The conversation, of which the assistant's turns are learned."""
        messages, tokenizer = conversation.messages, self._needed(where)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise UserError(f"{where} has no answer of the assistant: give one, or data.generate=true")
        if not tokenizer.chat_template:
            if conversation.plain is None:
                raise UserError(f"{where} holds messages, and the tokenizer has no chat template: give template=PATH")
            prompt, answer = (
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in conversation.plain
            )
            ids = [*self.begin, *prompt, *answer]
            return self._masked(ids, [(len(ids) - len(answer), len(ids))])
        whole = self._encoded(conversation, where, prompt=False)
        spans = []
        for index in answers:
            before = self._encoded(Conversation(messages[: index + 1], conversation.tools), where, prompt=True)
            upto = self._encoded(Conversation(messages[: index + 1], conversation.tools), where, prompt=False)
            # Some templates write earlier turns in another way once there are later ones: those are left out.
            if whole[: len(upto)] == upto:
                spans.append((_common(whole, before), len(upto)))
        return self._masked(whole, spans)

    def _encoded(self, conversation: Conversation, where: str, prompt: bool) -> list[int]:
        ids = encode_conversation(self.tokenizer, conversation, where, prompt)
        assert isinstance(ids, list)
        return ids

    def _masked(self, ids: list[int], spans: Sequence[tuple[int, int]]) -> list[TrainingText]:
        learned = [False] * len(ids)
        for first, last in spans:
            learned[first:last] = [True] * (last - first)
        ids, learned = ids[: self.sequence_length], learned[: self.sequence_length]
        return [TrainingText(ids, learned)] if any(learned) else []

    def _texts(self, text: str, where: str) -> list[TrainingText]:
        """Pieces of a plain text."""
        ids = self._needed(where)(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = self.sequence_length - len(self.begin)
        pieces = [[*self.begin, *ids[start : start + size]] for start in range(0, len(ids), size)]
        return [self._text(piece) for piece in pieces if len(piece) >= min(8, self.sequence_length)]

    def _text(self, ids: list[int]) -> TrainingText:
        if self.generate and self.prompt_length:
            return TrainingText(ids[: self.prompt_length], None)
        return TrainingText(ids, [True] * len(ids))

    def _needed(self, where: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{where} is text, and the target's folder has no tokenizer")
        return self.tokenizer


def digest_of(sequences: Sequence[TrainingText], settings: object) -> str:
    """Identity of sequences and of how they are recorded: 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for sequence in sequences:
        digest.update(json.dumps([sequence.tokens, sequence.learned]).encode())
    return digest.hexdigest()[:16]


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
