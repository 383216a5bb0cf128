"""Stop strings: texts that end a completion, matched across the borders of tokens.

A completion ends with the first token after which its text holds a stop string. This depends on its tokens alone, so
that drafts, batches and streaming do not change it. The text of the completion ends before the stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hasten.accel.decoding.detokenizer import Detokenizer
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class StopStrings:
    """Stop strings, and the tokenizer whose text they are matched in; special tokens are no part of this text."""

    strings: tuple[str, ...]
    tokenizer: Any

    def __post_init__(self) -> None:
        for string in self.strings:
            if not string or "\ufffd" in string:
                raise UserError(
                    f"stop_strings holds {string!r}: expected text of one character or more, without U+FFFD"
                )

    def start(self) -> "StopMatcher":
        """A matcher for one completion."""
        return StopMatcher(self)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((place for place in map(text.find, self.strings) if place >= 0), default=len(text))]

    def held_back(self, text: str) -> int:
        """Number of the last characters of a text without stop string that may be the beginning of one."""
        longest = min(len(text), max(map(len, self.strings), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.strings)), 0)


class StopMatcher:
    """Finds the token of one completion that completes a stop string. matched: the string, None before."""

    def __init__(self, stop: StopStrings) -> None:
        self._strings = stop.strings
        self._longest = max(map(len, stop.strings), default=1)
        self._text = Detokenizer(stop.tokenizer)
        self._tail = ""  # the last characters before the next token, where a match may begin
        self.matched: str | None = None

    def add(self, tokens: Sequence[int]) -> int | None:
        """Number of the new tokens up to the first that completes a stop string; None if none does."""
        before = self._text.copy()
        text = self._tail + self._text.add(tokens)
        if not self._text.is_complete or any(string in text for string in self._strings):
            # Rare, so that only here are the tokens decoded one by one. An incomplete character at the end may hide
            # whole ones before it.
            self._text, text = before, self._tail
            for count, token in enumerate(tokens, 1):
                text += self._text.add([token])
                found = {text.find(string): string for string in reversed(self._strings) if string in text}
                if found:
                    self.matched = found[min(found)]
                    return count
        self._tail = text[max(0, len(text) - self._longest + 1) :]
        return None
