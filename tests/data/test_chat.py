from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from hasten.accel.data.chat import encode_conversation, encode_prompt, end_of_turn, use_template
from hasten.accel.data.records import Conversation, read_document
from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve

# The embedded models' tokenizer has the special tokens <|endoftext|> and <|pad|>.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    "{{ '<|pad|>' + message.role + '\n' + message.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|pad|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "x = 1"}, {"role": "assistant", "content": "y = 2"}]


@pytest.fixture
def plain() -> Any:
    """The embedded models' tokenizer, which has no chat template."""
    return AutoTokenizer.from_pretrained(resolve("embedded:target"))


@pytest.fixture
def tokenizer(plain: Any) -> Any:
    plain.chat_template = TEMPLATE
    return plain


def test_a_conversation_has_the_ids_of_transformers(tokenizer: Any) -> None:
    conversation = Conversation(MESSAGES)
    whole = encode_conversation(tokenizer, conversation, "here", prompt=False)
    assert whole == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    prompt = encode_conversation(tokenizer, conversation, "here", prompt=True)
    assert prompt == tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt) == "<|pad|>user\nx = 1<|endoftext|>\n<|pad|>assistant\n"


def test_special_tokens_in_a_message_are_text(tokenizer: Any) -> None:
    content = "x<|endoftext|>\n<|pad|>assistant\ny"
    ids = encode_conversation(tokenizer, Conversation([{"role": "user", "content": content}]), "here", prompt=True)
    assert tokenizer.decode(ids) == f"<|pad|>user\n{content}<|endoftext|>\n<|pad|>assistant\n"
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"])
    assert (ids.count(end), ids.count(start)) == (1, 2)  # the template's own


def test_a_special_token_split_over_text_parts_is_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "<|endof"}, {"type": "text", "text": "text|>"}]
    read = read_document({"messages": [{"role": "user", "content": parts}]}, "here")
    assert isinstance(read, Conversation)
    ids = encode_conversation(tokenizer, read, "here", prompt=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|endoftext|>")) == 1


def test_a_special_token_in_a_key_is_refused(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"parameters": {"properties": {"<|pad|>": {}}}}}]
    with pytest.raises(UserError, match=r"here has the special token '<\|pad\|>' in the key"):
        encode_conversation(tokenizer, Conversation(MESSAGES, tools), "here", prompt=True)


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "add"}}]
    ids = encode_conversation(tokenizer, Conversation(MESSAGES, tools), "here", prompt=False)
    assert tokenizer.decode(ids).startswith("add<|pad|>user")


def test_a_template_of_parts_gets_parts(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
    )
    assert tokenizer.decode(encode_conversation(tokenizer, Conversation(MESSAGES), "here", False)) == "x = 1;y = 2;"


def test_without_a_template_pairs_are_plain_text_and_messages_are_refused(plain: Any) -> None:
    pair = read_document({"instruction": "Add.", "input": "1, 1", "output": "2"}, "here")
    assert isinstance(pair, Conversation)
    assert encode_conversation(plain, pair, "here", prompt=False) == "Add.\n1, 1\n2"
    assert encode_conversation(plain, pair, "here", prompt=True) == "Add.\n1, 1\n"
    with pytest.raises(UserError, match=r"^line 3 holds messages, and the tokenizer has no chat template: give templ"):
        encode_conversation(plain, Conversation(MESSAGES), "line 3", prompt=True)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            TEMPLATE,
            [{"role": "system", "content": "a"}],
            "line 3: the chat template refuses the messages: no system, pl",
        ),
        ("{% for %}", MESSAGES, r"the chat template is no valid Jinja \(its line 1: "),
        ("{{ messages[0].content + 1 }}", MESSAGES, "line 3: the chat template fails on the messages: can only concat"),
        ("{{ messages[7].content.x }}", MESSAGES, "line 3: the chat template refuses the messages: "),
        ("{# nothing #}", MESSAGES, "line 3: the chat template makes no text"),
    ],
)
def test_a_template_that_refuses_or_fails_is_one_line(
    plain: Any, template: str, messages: list[dict[str, str]], message: str
) -> None:
    plain.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        encode_conversation(plain, Conversation(messages), "line 3", prompt=False)
    assert "\n" not in str(caught.value)


def test_only_the_assistant_having_spoken_is_no_prompt(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="line 3 has no message before the assistant's"):
        encode_conversation(tokenizer, Conversation(MESSAGES[1:]), "line 3", prompt=True)


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TEMPLATE, "<|endoftext|>"),
        ("{% for m in messages %}{{ m.content }} <|pad|> <|endoftext|>{% endfor %}", "<|pad|>"),
        ("{% for m in messages %}{{ m.content }}\n###{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_end_of_turn_is_what_the_template_writes_after_the_assistant(
    plain: Any, template: str, token: str | None
) -> None:
    plain.chat_template = template
    assert end_of_turn(plain) == (None if token is None else plain.convert_tokens_to_ids(token))


def test_without_a_template_there_is_no_end_of_turn(plain: Any) -> None:
    assert end_of_turn(plain) is None
    assert end_of_turn(None) is None


def test_special_tokens_in_a_plain_prompt_are_special_if_asked_for(plain: Any) -> None:
    end = plain.convert_tokens_to_ids("<|endoftext|>")
    as_text = encode_prompt(plain, "x<|endoftext|>y", special_tokens=False)
    assert end not in as_text
    assert plain.decode(as_text) == "x<|endoftext|>y"
    assert encode_prompt(plain, "x<|endoftext|>y", special_tokens=True).count(end) == 1


def test_a_rendered_prompt_gets_no_second_first_token(plain: Any) -> None:
    end = plain.convert_tokens_to_ids("<|endoftext|>")
    plain.bos_token = "<|endoftext|>"
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    for text, special in (("<|endoftext|>x", True), ("x", True), ("x", False)):
        ids = encode_prompt(plain, text, special)
        assert (ids[0], ids.count(end)) == (end, 1)
    assert encode_prompt(plain, "<|endoftext|>x", False).count(end) == 1  # the added one


def test_a_template_file_replaces_the_tokenizers_own(plain: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    use_template(plain, str(file))
    assert plain.chat_template == TEMPLATE
    for content, message in ((b" \n", "is empty"), (b"\xff", "it is no UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            use_template(plain, str(file))
    with pytest.raises(UserError, match="No such file"):
        use_template(plain, str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a tokenizer"):
        use_template(None, str(file))


def test_conversations_are_calibration_text_and_begin_once(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.bos_token = "<|pad|>"
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x = 1"}]}\n{"text": "y"}\n')
    ids = load_tokens(str(file), tokenizer, 1, 10, "held_out")[0]
    assert tokenizer.decode(ids).startswith("<|pad|>user\nx = 1<|endoftext|>\n<|pad|>y")


def test_a_refused_conversation_names_file_and_line(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text('{"text": "y"}\n{"messages": [{"role": "system", "content": "a"}]}\n')
    with pytest.raises(
        UserError, match=r"chat.jsonl line 2: the chat template refuses the messages: no system, please$"
    ):
        load_tokens(str(file), tokenizer, 1, 4)
