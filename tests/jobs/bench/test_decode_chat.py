"""`hasten bench decode` on chat prompts: its tables, the end of a turn, and the files that it reads."""

import json
import shutil

import pytest

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.bench import decode
from hasten.jobs.bench.decoding.conversations import read_conversations
from hasten.jobs.bench.decoding.setup import Setup
from hasten.jobs.bench.decoding.speed import generate_tokens
from hasten.jobs.common.schema import Tracking
from hasten.jobs.common.tokenizer import load_tokenizer

# The embedded model continues Python code, so its chat is one of comments.
TEMPLATE = "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}import os\n"
PROMPTS = [
    {"category": "code", "messages": [{"role": "user", "content": "Read a file and return its lines."}]},
    {"category": "code", "messages": [{"role": "user", "content": "Add two numbers, and raise an error for text."}]},
    {"category": "writing", "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi."}]},
    {"category": "code", "messages": [{"role": "user", "content": "Parse an option of the command line."}]},
]


@pytest.fixture
def files(tmp_path):
    """Options of a target with a chat template whose turns end at a line break, and of a file of prompts."""
    target = shutil.copytree(resolve("embedded:target"), tmp_path / "target")
    line_break = load_tokenizer(target)("\n", add_special_tokens=False)["input_ids"][-1]
    generation = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0, line_break]}))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    return {
        "target": str(target),
        "template": str(tmp_path / "template.jinja"),
        "prompts": [str(tmp_path / "questions.jsonl")],
    }


def test_tables_by_category_and_with_sequences_in_flight(tmp_path, files):
    config = decode.Config(
        **files,
        per_category=2,
        max_new_tokens=24,
        drafters=["prompt_lookup", "token_recycling"],
        max_draft_tokens=4,
        chat_in_flight=[1, 3],
        document=str(tmp_path / "benchmarks.md"),
        run_dir=str(tmp_path / "run"),
        tracking=Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )
    metrics = json.loads(decode.run(config).read_text())["metrics"]
    ways = ("transformers_generate", "transformers_prompt_lookup", "hasten_plain", "prompt_lookup", "token_recycling")
    assert [metrics[f"questions.{way}.same"] for way in ways] == [3.0] * len(ways)
    for category in ("code", "writing", "all"):
        assert metrics[f"questions.{category}.hasten_plain.tokens_per_pass"] == 1
        assert metrics[f"questions.{category}.prompt_lookup.tokens_per_pass"] >= 1
        assert f"questions.{category}.transformers_generate.tokens_per_second" in metrics
    assert metrics["questions.in_flight.3.hasten_plain.tokens_per_pass"] == 1
    assert "questions.in_flight.3.transformers_generate.tokens_per_second" in metrics
    assert "questions.in_flight.3.transformers_prompt_lookup.tokens_per_second" not in metrics  # of one sequence only
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## decode, chat: " in text
    assert "## decode: " not in text  # the section of the texts stays as it was
    assert "| writing |" in text


def test_answers_end_at_the_end_of_a_turn_in_every_way(files):
    setup = Setup(decode.Config(**files, per_category=2, max_new_tokens=48, max_draft_tokens=4, chat_in_flight=[2]))
    [prompts] = setup.chat.values()
    alone = [generate_tokens(setup, [ids], setup.stop)[0] for ids in prompts.tokens]
    assert any(len(tokens) < 48 for tokens in alone)
    for tokens in alone:
        assert not set(tokens[:-1]) & set(setup.stop)
        assert len(tokens) == 48 or tokens[-1] in setup.stop
    assert generate_tokens(setup, prompts.tokens, setup.stop) == alone
    engine = setup.engine(setup.drafter("prompt_lookup"), 2, stop=setup.stop)
    decoded = {int(result.id): result.token_ids for result in engine.decode(setup.requests(prompts.tokens))}
    assert [decoded[index] for index in range(len(alone))] == alone


def test_prompts_are_rendered_by_the_template_and_the_categories_take_turns(files):
    setup = Setup(decode.Config(**files, per_category=2, max_draft_tokens=2, chat_in_flight=[1]))
    [prompts] = setup.chat.values()
    assert prompts.categories == ["code", "writing", "code"]
    assert prompts.by_category == {"code": [0, 2], "writing": [1]}
    tokenizer = load_tokenizer(resolve("embedded:target"))
    assert tokenizer.decode(prompts.tokens[1]).strip() == "# system: Brief.\n# user: Hi.\nimport os"
    assert not setup.prompts


def test_hastens_own_prompts_fill_the_context_of_no_model_of_2048_tokens():
    tokenizer = load_tokenizer(resolve("embedded:target"))
    tokenizer.chat_template = TEMPLATE
    prompts = read_conversations("chat", tokenizer, len(tokenizer), 25, 64, 2048)
    assert len(prompts.tokens) == 200
    assert len(prompts.by_category) == 8
    assert prompts.warm_up not in prompts.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template": None},
            r"prompts=.*questions.jsonl, line 1 holds messages, and the tokenizer has no chat template",
        ),
        ({"max_new_tokens": 4000}, r"prompts=.*, line 1: the prompt '1' has .* longer than the target's context"),
        ({"chat_in_flight": [4, 0]}, r"chat_in_flight=\[4, 0\] is wrong: expected"),
        ({"chat_in_flight": []}, r"chat_in_flight=\[\] is wrong: expected"),
        ({"prompts": ["chat", "other/chat.jsonl:text"]}, r"has two files of the name chat"),
        ({"prompts": ["nowhere.jsonl"]}, r"prompts=nowhere.jsonl cannot be read: expected chat, a JSON Lines file"),
    ],
)
def test_what_cannot_be_decoded_is_refused(files, options, message):
    with pytest.raises(UserError, match=message):
        Setup(decode.Config(**{**files, **options}))
