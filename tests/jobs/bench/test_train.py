import pytest

from hasten.accel.errors import UserError
from hasten.jobs.bench import train

RESULTS = {
    "medusa": {
        "seconds": {"hasten": 0.1, "transformers": 0.15},
        "flops": 5e9,
        "parameters": 1_310_720,
        "first_loss": 20.0,
    }
}


def test_a_row_has_tokens_a_second_and_the_share_of_the_matrix_rate():
    text = train._section(train.Config(batch=4, window=250), RESULTS, 1e11)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| medusa, 1.31 M | hasten | 0.100 | 10000 | 50% | 1.50 |",
        "| medusa, 1.31 M | transformers' Trainer | 0.150 | 6667 | 33% |  |",
    ]


@pytest.mark.parametrize(
    ("heads", "words"), [(["acceptance"], "heads=acceptance drafts nothing"), (["medusae"], "medusae")]
)
def test_a_head_that_cannot_be_trained_here_is_named(heads, words, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=words):
        train.run(train.Config(heads=heads))


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install accelerate"):
        train.run(train.Config())
