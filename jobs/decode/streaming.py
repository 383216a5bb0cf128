"""Completions printed token by token, for `hasten decode stream=true`."""

from collections.abc import Sequence

from hasten.accel.decoding.detokenizer import Detokenizer
from hasten.jobs.decode.stopping import Stopping


class Printer:
    """Prints completions as they are decoded, each below its prompt's id; without a tokenizer as token ids."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._id: str | None = None
        self._text: Detokenizer | None = None
        self._held_back = ""  # text that may be the beginning of a stop string

    def tokens(self, key: str, new: Sequence[int]) -> None:
        """Print new tokens of a completion; bytes of an incomplete character wait for the next tokens."""
        tokenizer, strings = self._stopping.tokenizer, self._stopping.strings
        if key != self._id:
            self.end()
            print(f"{'' if self._id is None else chr(10)}--- {key}")
            self._id, self._text = key, None if tokenizer is None else Detokenizer(tokenizer)
        if self._text is None:
            print("".join(f"{token} " for token in new), end="", flush=True)
            return
        text = self._held_back + self._text.add(new)
        if strings is not None:
            before = strings.cut(text)
            # Nothing follows a stop string, so that its beginning is not printed later either.
            count = 0 if before != text else strings.held_back(text)
            text, self._held_back = before[: len(before) - count], before[len(before) - count :]
        print(text, end="", flush=True)

    def end(self) -> None:
        """Print what was held back of the last completion."""
        print(self._held_back, end="", flush=True)
        self._held_back = ""
