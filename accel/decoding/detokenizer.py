"""The text of a growing sequence of token ids; each step decodes only the last few of them."""

from collections.abc import Sequence
from typing import Any

# Tokens before the new ones that are decoded again: some tokenizers write the first token of a text differently.
_CONTEXT = 4
_INVALID = "\ufffd"
# Some tokenizers decode all of the bytes before an incomplete character as invalid ones. More than this many are no
# text, and only the last three can still become a character.
_LONG_RUN, _MAX_INCOMPLETE = 64, 3


class Detokenizer:
    """Text of one sequence without special tokens, in pieces.

    Bytes at the end that are no whole character yet are held back until later tokens complete the character.
    is_complete: whether none are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        # The last tokens; the first _shown characters of their text were returned before.
        self._window: list[int] = []
        self._shown = 0
        self.is_complete = True

    def copy(self) -> "Detokenizer":
        """Another detokenizer at the same place of the sequence."""
        other = Detokenizer.__new__(Detokenizer)
        vars(other).update(vars(self) | {"_window": list(self._window)})
        return other

    def add(self, tokens: Sequence[int]) -> str:
        """The text that further tokens add."""
        self._window += [token for token in tokens if token not in self._special]
        text = self._decode(self._window)
        held_back = len(text) - len(text.rstrip(_INVALID))
        self.is_complete = held_back == 0
        if held_back > _LONG_RUN:
            held_back = _MAX_INCOMPLETE
        end = len(text) - held_back
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if self.is_complete or held_back == _MAX_INCOMPLETE:
            self._shorten(held_back)
        return piece

    def _shorten(self, held_back: int) -> None:
        """Drop old tokens, down to a window that does not begin inside a character."""
        size = _CONTEXT
        while size < len(self._window):
            text = self._decode(self._window[-size:])
            if not text.startswith(_INVALID) or size > _LONG_RUN:
                self._window, self._shown = self._window[-size:], len(text) - held_back
                return
            size *= 2

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
