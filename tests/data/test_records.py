from typing import Any

import pytest

from hasten.accel.data.records import Conversation, read_document, read_prompt
from hasten.accel.errors import UserError

USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Count."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "system": "Count."},
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"prompt": [SYSTEM, USER], "completion": "2"},
        {
            "conversations": [
                {"from": "system", "value": "Count."},
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2"},
            ]
        },
        {"conversations": [SYSTEM, USER, ASSISTANT], "id": "a"},
        {"system": "Count.", "instruction": "1+1?", "input": "", "output": "2"},
        {"system_prompt": "Count.", "question": "1+1?", "response": "2"},
        {"prompt": "1+1?", "completion": "2", "system": "Count."},
    ],
)
def test_records_of_different_fields_are_the_same_conversation(record: dict[str, Any]) -> None:
    read = read_document(record, "here")
    assert isinstance(read, Conversation)
    assert read.messages == [SYSTEM, USER, ASSISTANT]
    prompt = read_prompt(record, "here")
    assert isinstance(prompt, Conversation)
    # The assistant's last turn is what is decoded.
    assert prompt.prompt().messages == read.prompt().messages == [SYSTEM, USER]


def test_an_instruction_is_followed_by_its_input() -> None:
    record = {"instruction": "Add.", "context": "1 and 1", "response": "2", "category": "sums"}
    read = read_document(record, "here")
    assert isinstance(read, Conversation)
    assert read.messages == [{"role": "user", "content": "Add.\n\n1 and 1"}, ASSISTANT]
    assert read.plain == ("Add.\n1 and 1\n", "2")


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        ({"question": "1+1?", "answer": "2"}, ("1+1?\n", "2")),
        ({"prompt": "1+1=", "completion": "2"}, ("1+1=", "2")),
        ({"instruction": "Add.", "output": "2", "system": "Count."}, ("Count.\nAdd.\n", "2")),
        ({"messages": [USER, ASSISTANT]}, None),
    ],
)
def test_pairs_have_a_plain_form_and_messages_have_none(record: dict[str, Any], plain: tuple[str, str] | None) -> None:
    read = read_document(record, "here")
    assert isinstance(read, Conversation)
    assert read.plain == plain


def test_a_prompt_alone_is_plain_text_and_token_ids_stay() -> None:
    assert read_prompt({"prompt": "def f("}, "here") == "def f("
    assert read_prompt({"prompt": "def f(", "text": "no", "question": "no"}, "here") == "def f("
    assert read_prompt({"prompt": [1, 2]}, "here") == [1, 2]
    assert read_prompt({"text": "def f("}, "here") == "def f("
    assert read_prompt({"question": "1+1?", "answer": "2"}, "here", "question") == "1+1?"
    assert read_prompt({"chat": [USER]}, "here", "chat") == Conversation([USER])


def test_text_to_calibrate_on_is_the_field_text_or_all_text_fields() -> None:
    assert read_document({"text": "a", "messages": [USER]}, "here") == "a"
    assert read_document({"title": "a", "number": 1, "body": "b"}, "here") == "a\nb"
    assert read_document({"title": "a", "body": "b"}, "here", "body") == "b"
    assert read_document({"text": "a", "turns": [USER]}, "here", "turns") == Conversation([USER])


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    assert read_document({"messages": [{"role": "user", "content": parts}]}, "here") == Conversation([USER])


def test_tools_and_arguments_may_be_json_text() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    read = read_document({"messages": messages, "tools": '[{"type": "function"}]'}, "here")
    assert isinstance(read, Conversation)
    assert read.tools == [{"type": "function"}]
    assert read.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert read_document({"messages": [USER], "tools": TOOLS}, "here") == Conversation([USER], TOOLS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, "'messages' that is no list of messages but text"),
        ({"messages": []}, "'messages' that is no list of messages but a list"),
        ({"messages": [USER, "hello"]}, r"messages\[1\] is text, no message such as"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has no 'role': expected one of system, developer, user"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\] has the role 'robot': expected one of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is a number: expected text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"messages\[0\].content\[0\] is 'image_url': only parts of the type 'text' are read",
        ),
        ({"messages": [USER], "tools": "x"}, "'tools' that are text and no JSON"),
        ({"messages": [USER], "tools": [1]}, "'tools' that are no list of JSON schemas"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] has no 'value'"),
        ({"conversations": [{"from": "dog", "value": "a"}]}, r"conversations\[0\] has the role 'dog'"),
        ({"instruction": ["Add."], "output": "2"}, "'instruction' that is no text but a list"),
    ],
)
def test_a_malformed_record_names_the_field(record: dict[str, Any], message: str) -> None:
    for read in (read_document, read_prompt):
        with pytest.raises(UserError, match=message) as caught:
            read(record, "source=a.jsonl line 7")
        assert str(caught.value).startswith("source=a.jsonl line 7")


def test_an_answer_that_is_no_text_is_no_part_of_a_prompt() -> None:
    record = {"instruction": "Add.", "output": ["2"]}
    assert read_prompt(record, "here") == Conversation([{"role": "user", "content": "Add."}], None, ("Add.\n", ""))
    with pytest.raises(UserError, match="here has a 'output' that is no text but a list"):
        read_document(record, "here")
    read = read_document({"question": "1+1?", "answer": 2}, "here")
    assert isinstance(read, Conversation)
    assert read.messages == [USER, ASSISTANT]


def test_an_empty_pair_is_no_prompt_and_no_text() -> None:
    record = {"instruction": "", "input": "", "output": ""}
    assert read_document(record, "here") == ""
    with pytest.raises(UserError, match="here has an empty 'instruction'"):
        read_prompt(record, "here")


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (
            {"body": "a"},
            "prompt",
            r"no 'prompt' \(or messages, conversations, instruction, question, text\), only body",
        ),
        ({"body": "a"}, "title", "no 'title', only body: give prompt_field=NAME"),
        ({"prompt": 3}, "prompt", "neither text nor a list of token ids or of messages"),
    ],
)
def test_a_record_without_a_prompt_is_refused(record: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompt(record, "here", field)


def test_a_record_without_text_is_refused() -> None:
    with pytest.raises(UserError, match="here has no text; its fields are id"):
        read_document({"id": 3}, "here")
