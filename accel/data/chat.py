"""Conversations as token ids, through a tokenizer's chat template.

Special tokens that occur in the messages' own text are encoded as plain text (`sanitize_control_tokens` of
transformers), so that a text cannot end a turn or begin another. Templates write the token that begins a text
themselves, so the tokenizer adds none.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from hasten.accel.data.records import Conversation, read_document
from hasten.accel.errors import UserError

_ANSWER = "ANSWER"
# Keys of most messages: they hold no special token, of which some tokenizers have a thousand to read for each record.
_KEYS = {"role", "content"}


def use_template(tokenizer: Any, path: str) -> None:
    """Give the tokenizer a file's Jinja template in place of its own; UserError if the file cannot be read."""
    if tokenizer is None:
        raise UserError(f"template={path} needs a tokenizer, and the model's folder has none")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"template={path} cannot be read ({reason}): give a file of a Jinja chat template") from None
    if not text.strip():
        raise UserError(f"template={path} is empty: give a file of a Jinja chat template")
    tokenizer.chat_template = text


def encode_record(tokenizer: Any, record: Mapping[str, Any], where: str, field: str | None = None) -> str | list[int]:
    """A record's text to calibrate on, or the token ids of its conversation; see records.read_document."""
    document = read_document(record, where, field)
    return document if isinstance(document, str) else encode_conversation(tokenizer, document, where, prompt=False)


def encode_conversation(tokenizer: Any, conversation: Conversation, where: str, prompt: bool) -> list[int] | str:
    """Token ids of a conversation; its plain text if the tokenizer has no template and the record needs none.

    prompt: leave out the assistant's last turn, and end with the beginning of a new one. where: file and line, for
    messages. Raises UserError if the template is missing, or refuses the messages.
    """
    if prompt:
        conversation = conversation.prompt()
        if not conversation.messages:
            raise UserError(f"{where} has no message before the assistant's: there is nothing to answer")
    if not tokenizer.chat_template:
        if conversation.plain is None:
            raise UserError(f"{where} holds messages, and the tokenizer has no chat template: give template=PATH")
        return "".join(conversation.plain)
    _check_keys(tokenizer, [conversation.messages, conversation.tools], where)
    try:
        ids = tokenizer.apply_chat_template(
            _as_expected(tokenizer, conversation),
            tools=conversation.tools,
            add_generation_prompt=prompt,
            sanitize_control_tokens=True,
            return_dict=False,
        )
    except TemplateSyntaxError as error:
        raise UserError(
            f"{where}: the chat template is no valid Jinja (its line {error.lineno}: {_line(error)})"
        ) from None
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses the messages: {_line(error)}") from None
    except Exception as error:  # a template is a program, and fails in any way on messages that it does not expect
        raise UserError(f"{where}: the chat template fails on the messages: {_line(error)}") from None
    if not ids:
        raise UserError(f"{where}: the chat template makes no text of the messages")
    return list(ids)


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an assistant's turn; None if it writes none, or not at once."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    exchange = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(_as_expected(tokenizer, Conversation(exchange)), tokenize=False)
    except Exception:  # this template has no such exchange
        return None
    _, answer, after = text.rpartition(_ANSWER)
    special = [(token.content, index) for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    begins = [(content, index) for content, index in special if after.lstrip().startswith(content)]
    return max(begins, key=lambda token: len(token[0]))[1] if answer and begins else None


def encode_prompt(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Token ids of a plain prompt, with the tokens that the tokenizer adds to every text.

    special_tokens: whether names of special tokens in the text, such as `<|im_end|>`, are those tokens. Raises
    UserError if they must not be, and the tokenizer cannot encode them as text.
    """
    ids: list[int] = tokenizer(text, split_special_tokens=not special_tokens, verbose=False)["input_ids"]
    names = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    begin = tokenizer.bos_token_id
    if special_tokens:
        # The text may begin with the token that the tokenizer adds, as rendered conversations do.
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] and _begins(tokenizer, text) else ids
    written = {names[name] for name in names if name in text}
    if written.intersection(ids):
        added = tokenizer("", verbose=False)["input_ids"]
        if any(ids.count(index) > added.count(index) for index in written):
            raise UserError(
                "this tokenizer cannot encode the names of special tokens as text: give special_tokens=true"
            )
    return ids


def _begins(tokenizer: Any, text: str) -> bool:
    return text.lstrip().startswith(str(tokenizer.bos_token))


def _as_expected(tokenizer: Any, conversation: Conversation) -> list[dict[str, Any]]:
    """The messages, their content as a list of parts if the template reads nothing else."""
    probe = [{"role": "user", "content": _ANSWER}]
    try:
        reads_text = _ANSWER in tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception:
        reads_text = True
    if reads_text:
        return conversation.messages
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
        for message in conversation.messages
    ]


def _check_keys(tokenizer: Any, value: object, where: str) -> None:
    """UserError if a key holds a special token: transformers encodes only values as plain text."""
    keys: dict[str, None] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            keys |= dict.fromkeys(map(str, item))
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    if keys.keys() <= _KEYS:
        return
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    for key in keys:
        if found := pattern.search(key):
            raise UserError(f"{where} has the special token {found.group()!r} in the key {key!r}")


def _line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())
