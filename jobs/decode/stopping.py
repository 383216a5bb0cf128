"""What ends a completion: the model's end tokens, the end of the assistant's turn, and the user's tokens and texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.accel.data.chat import end_of_turn
from hasten.accel.decoding.stop_strings import StopStrings
from hasten.accel.errors import UserError
from hasten.jobs.common.prompts import Prompt, stop_ids
from hasten.jobs.common.tokenizer import Tokenizer
from hasten.jobs.decode.options import DecodeConfig


@dataclass(frozen=True)
class Stopping:
    """tokens: ids that end every completion, with the place that names each. turn: id that ends those of chat prompts.

    strings: texts that end a completion; None if there are none. tokenizer: None if the target has none.
    """

    tokens: dict[int, str]
    turn: int | None
    strings: StopStrings | None
    tokenizer: Tokenizer | None

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids that end the completion of this prompt, in addition to `tokens`."""
        return () if self.turn is None or not prompt.is_chat else (self.turn,)

    def text(self, token_ids: Sequence[int]) -> str | None:
        """Text of a completion, up to a stop string; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        return text if self.strings is None else self.strings.cut(text)

    def stopped_by(self, ended: str, token_ids: Sequence[int], stop_string: str | None) -> str | int | None:
        """The stop string that ended a completion, or the token (its name, else its id); None if neither did."""
        if ended != "stop" or stop_string is not None:
            return stop_string
        return self._name(token_ids[-1])

    def report(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Entries of the report: what ends the completions of these prompts."""
        places = dict(self.tokens)
        if self.turn is not None and any(prompt.is_chat for prompt in prompts):
            places.setdefault(self.turn, "the chat template")
        return {
            "stop_tokens": [
                {"id": index, "token": self._name(index), "from": place} for index, place in sorted(places.items())
            ],
            "stop_strings": [] if self.strings is None else list(self.strings.strings),
            "chat_prompts": sum(prompt.is_chat for prompt in prompts),
        }

    def _name(self, index: int) -> str | int:
        return index if self.tokenizer is None else str(self.tokenizer.convert_ids_to_tokens(index))


def chosen_stopping(config: DecodeConfig, target: Path, tokenizer: Tokenizer | None, vocabulary: int) -> Stopping:
    """What the options and the target name; UserError for ids and texts that can never occur."""
    wrong = [token for token in config.stop if not 0 <= token < vocabulary]
    if wrong:
        raise UserError(f"stop={config.stop} holds {wrong[0]}, outside the target's vocabulary (0 to {vocabulary - 1})")
    if config.stop_strings and tokenizer is None:
        raise UserError("stop_strings needs a tokenizer, and the target's folder has none: give stop=[ID, …]")
    strings = StopStrings(tuple(config.stop_strings), tokenizer) if config.stop_strings else None
    tokens = dict.fromkeys(config.stop, "stop")
    if tokenizer is not None:
        # Special tokens are no part of a completion's text, so their names are matched as tokens.
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokens = {special[name]: "stop_strings" for name in config.stop_strings if name in special} | tokens
    if config.ignore_eos:
        return Stopping(tokens, None, strings, tokenizer)
    return Stopping(tokens | stop_ids(target, tokenizer), end_of_turn(tokenizer), strings, tokenizer)
