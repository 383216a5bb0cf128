"""Records of prompts and of calibration data, in the fields that data sets use: a conversation, a pair, or plain text.

| kind | fields | becomes |
| --- | --- | --- |
| chat | `messages`, or `prompt` as a list of messages, with `tools` | messages of `role` and `content` |
| ShareGPT | `conversations` of `from` and `value`, with `system`, `tools` | messages |
| Alpaca, Dolly | `instruction`, `input` or `context`, `output` or `response` | user and assistant message |
| question | `question`, `answer` or `response` | user and assistant message |
| pair | `prompt`, `completion` or `response` | user and assistant message |
| plain text | `text`, or a `prompt` alone | text |
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hasten.accel.errors import UserError

Message: TypeAlias = dict[str, Any]

# JSON may contain a lone surrogate, which neither a tokenizer nor a text file accepts.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Speakers of ShareGPT's conversations.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CONVERSATIONS = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
# Field of the user's turn, fields that it continues with, and names of the field of the assistant's turn.
_PAIRS = (
    ("prompt", (), ("completion", "response")),
    ("instruction", ("input", "context"), ("output", "response", "completion")),
    ("question", (), ("answer", "response")),
)


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    tools: JSON schemas of the functions that the model may call. plain: the prompt and the completion as plain text,
    for a tokenizer without a template; None if the record has no such form.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    plain: tuple[str, str] | None = None

    def prompt(self) -> "Conversation":
        """The conversation without the assistant's last turn, if it ends with one."""
        ends = self.messages[-1]["role"] == "assistant"
        plain = None if self.plain is None else (self.plain[0], "")
        return Conversation(self.messages[:-1] if ends else self.messages, self.tools, plain)


def check_characters(line: str, record: Mapping[str, Any], where: str) -> None:
    """UserError if a record, read from a line of JSON, holds half a character."""
    if "\\ud" in line.lower() and _HALF_CHARACTER.search(json.dumps(record, ensure_ascii=False)):
        raise UserError(f"{where} holds half a character (\\ud800 to \\udfff), which is no text")


def read_document(record: Mapping[str, Any], where: str, field: str | None = None) -> Conversation | str:
    """The text to calibrate, evaluate or train on; empty if all of its fields are.

    field: of the text or of the messages; None takes `text`, else the first kind of the table above, else all string
    fields joined by line breaks. where: file and line, for messages. Raises UserError if there is no text.
    """
    if field is not None:
        value = record.get(field)
        if isinstance(value, list):
            return _conversation(record, field, where)
        if not isinstance(value, str):
            raise UserError(f"{where}: no text in field {field!r}; fields are {', '.join(record)}")
        return value
    if isinstance(record.get("text"), str):
        return str(record["text"])
    conversation = _structured(record, where, answered=True)
    if conversation is not None:
        return conversation if any(message.get("content") for message in conversation.messages) else ""
    strings = [value for value in record.values() if isinstance(value, str)]
    if not strings:
        raise UserError(f"{where} has no text; its fields are {', '.join(record) or 'none'}")
    return "\n".join(strings)


def read_prompt(record: Mapping[str, Any], where: str, field: str = "prompt") -> Conversation | str | list[int]:
    """The prompt to decode: a conversation, text, or a list of token ids.

    field: of the prompt. If it is not `prompt`, its value alone is the prompt. Otherwise a chat or ShareGPT
    conversation comes before it, and instruction, question and `text` after it. The answer of a pair is not read.
    Raises UserError if there is no prompt.
    """
    if field != "prompt":
        if field not in record:
            raise UserError(f"{where} has no {field!r}, only {', '.join(record)}: give prompt_field=NAME")
        return _prompt_value(record, field, where)
    conversation = _structured(record, where, answered=False)
    if conversation is not None:
        return conversation
    if field in record:
        return _prompt_value(record, field, where)
    if isinstance(record.get("text"), str):
        return str(record["text"])
    kinds = ", ".join((*_CONVERSATIONS, *(pair[0] for pair in _PAIRS if pair[0] != field), "text"))
    raise UserError(f"{where} has no {field!r} (or {kinds}), only {', '.join(record)}: give prompt_field=NAME")


def _prompt_value(record: Mapping[str, Any], field: str, where: str) -> Conversation | str | list[int]:
    value = record[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    if isinstance(value, list) and any(isinstance(message, dict) for message in value):
        return _conversation(record, field, where)
    raise UserError(f"{where} has a {field!r} that is neither text nor a list of token ids or of messages")


def _structured(record: Mapping[str, Any], where: str, answered: bool) -> Conversation | None:
    """The conversation that the record's fields make, with the answer of a pair or without; None for another kind."""
    for field in _CONVERSATIONS:
        if record.get(field) is not None:
            return _conversation(record, field, where)
    prompt = record.get("prompt")
    if isinstance(prompt, list) and any(isinstance(message, dict) for message in prompt):
        return _conversation(record, "prompt", where)
    for user, more, answers in _PAIRS:
        if record.get(user) is None:
            continue
        if user == "prompt" and not _has_answer(record, answers):
            if answered:
                continue
            return None  # plain text or token ids
        return _pair(record, user, more, answers if answered else None, where)
    return None


def _has_answer(record: Mapping[str, Any], answers: Sequence[str]) -> bool:
    """Whether a record with a `prompt` is a pair; token ids and a prompt alone are not."""
    return isinstance(record["prompt"], str) and any(record.get(name) is not None for name in answers)


def _pair(
    record: Mapping[str, Any], user: str, more: Sequence[str], answers: Sequence[str] | None, where: str
) -> Conversation:
    """A conversation of one question and its answer, if the record has one; answers=None is a prompt."""
    system = _first_text(record, _SYSTEM, where)
    asked = [text for text in (_first_text(record, (user,), where), _first_text(record, more, where)) if text]
    if not asked and answers is None:
        raise UserError(f"{where} has an empty {user!r}: give text")
    answer = _first_text(record, answers or (), where)
    messages: list[Message] = [{"role": "user", "content": "\n\n".join(asked)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    # A pair of `prompt` and `completion` is one text that was cut in two; the fields of the others are paragraphs.
    plain = "".join(asked) if user == "prompt" else "\n".join([*([system] if system else []), *asked, ""])
    return Conversation(messages, _tools(record, where), (plain, answer or ""))


def _first_text(record: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """Value of the first of the fields that the record has, numbers as text; None if it has none or they are null."""
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise UserError(f"{where} has a {name!r} that is no text but {_shown(value)}")
        return value
    return None


def _conversation(record: Mapping[str, Any], field: str, where: str) -> Conversation:
    messages = _messages(record[field], field, where)
    completion = record.get("completion") if field == "prompt" else None
    if isinstance(completion, str):
        messages.append({"role": "assistant", "content": completion})
    elif completion is not None:
        messages += _messages(completion, "completion", where)
    system = _first_text(record, _SYSTEM, where)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(record, where))


def _messages(value: object, field: str, where: str) -> list[Message]:
    """Messages with `role` and `content`; UserError names the message that is none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} has a {field!r} that is no list of messages but {_shown(value)}")
    return [_message(message, f"{where}, {field}[{index}]") for index, message in enumerate(value)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f'{where} is {_shown(message)}, no message such as {{"role": "user", "content": "text"}}')
    role_field, content_field = ("role", "content") if "role" in message else ("from", "value")
    role = message.get(role_field)
    if role_field == "from" and isinstance(role, str):
        role = _SPEAKERS.get(role, role)
    if role not in ROLES:
        wrong = "no 'role'" if role is None else f"the role {role!r}" if isinstance(role, str) else "a role of no text"
        raise UserError(f"{where} has {wrong}: expected one of {', '.join(ROLES)}")
    kept = {key: value for key, value in message.items() if key not in (role_field, content_field)}
    content = message.get(content_field)
    if content is None and kept.get("tool_calls"):
        return {"role": role, **_with_arguments(kept, where)}
    if content is None:
        raise UserError(f"{where} has no {content_field!r}")
    return {"role": role, "content": _content(content, f"{where}.{content_field}"), **_with_arguments(kept, where)}


def _content(content: object, where: str) -> str:
    """Text of a message; the text parts of a list are concatenated, as chat templates do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where} is {_shown(content)}: expected text or a list of text parts")
    parts = []
    for index, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif isinstance(part, str):
            parts.append(part)
        else:
            kind = repr(part["type"]) if isinstance(part, dict) and "type" in part else _shown(part)
            raise UserError(f"{where}[{index}] is {kind}: only parts of the type 'text' are read")
    return "".join(parts)


def _with_arguments(message: Message, where: str) -> Message:
    """The message with the arguments of tool calls as objects, which chat templates expect; OpenAI's are JSON text."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}.tool_calls is no list of objects")
    parsed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except ValueError:
                raise UserError(f"{where}.tool_calls has arguments that are no JSON") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return {**message, "tool_calls": parsed}


def _tools(record: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The record's `tools`, a list of JSON schemas or JSON text of one; None if it has none."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError(f"{where} has 'tools' that are text and no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where} has 'tools' that are no list of JSON schemas")
    return tools


def _shown(value: object) -> str:
    """A JSON value's kind, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "an object" if isinstance(value, dict) else "a list"
