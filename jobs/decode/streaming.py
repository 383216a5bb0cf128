"""Completions printed token by token, for `hasten decode stream=true`."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Printer:
    """Prints completions as they are decoded, each below its prompt's id; without a tokenizer as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._id: str | None = None
        self._ids: list[int] = []
        self._shown = ""

    def tokens(self, key: str, new: Sequence[int]) -> None:
        """Print new tokens of a completion; bytes of an incomplete character wait for the next tokens."""
        if key != self._id:
            print(f"{'' if self._id is None else chr(10)}--- {key}")
            self._id, self._ids, self._shown = key, [], ""
        self._ids += new
        if self._tokenizer is None:
            text = " ".join(map(str, self._ids)) + " "
        else:
            text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).rstrip("\ufffd")
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text
