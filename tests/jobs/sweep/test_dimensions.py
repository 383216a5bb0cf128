"""Words with several values, in Hydra's grammar, and words with one, which need not be."""

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.cli.methods import method_names
from hasten.jobs.sweep.dimensions import Dimension, Words, read
from hasten.jobs.sweep.grid import grid


def dimension(word):
    """What the word says, which must have several values."""
    words = read([word], ["quantizer"])
    assert words.fixed == ()
    (found,) = words.dimensions
    assert found.key == word.partition("=")[0]
    return found


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("bits=2,3,4", ("2", "3", "4")),
        ("bits=range(2,6)", ("2", "3", "4", "5")),
        ("lr=range(0,1,0.25)", ("0.0", "0.25", "0.5", "0.75")),
        ("lr=range(0.1,0.5,0.1)", ("0.1", "0.2", "0.3", "0.4")),
        ("lr=range(1,0,-0.5)", ("1.0", "0.5")),
        ("lr=1e-3,1e-4", ("0.001", "0.0001")),
        ("name=choice(a,b)", ("a", "b")),
        ("name='a,b',c", ("a,b", "c")),
        ("name=null,1", ("null", "1")),
        ("fail=true,False", ("true", "false")),
        ("bits=[2,3],[4]", ("[2,3]", "[4]")),
        ("depths=[[1,2],[3,4]],[]", ("[[1,2],[3,4]]", "[]")),
        ("stop=['a,b',c],[d]", ("['a,b',c]", "[d]")),
        (r"stop=['a\.b'],[a\,b]", (r"['a\.b']", "['a,b']")),
        ("model=embedded:target,s3://b/c", ("embedded:target", "s3://b/c")),
        ("prompts=/a b/c.jsonl,/d", ("/a b/c.jsonl", "/d")),
        ("bits=sort(3,1,2)", ("1", "2", "3")),
        ("bits=sort(3,1,2,reverse=true)", ("3", "2", "1")),
        ("quantizer=glob(*)", tuple(method_names("quantizer"))),
        ("quantizer=glob(g*)", ("gptq",)),
    ],
)
def test_several_values_are_kept_as_texts_in_order(word, values):
    assert dimension(word).values == values


@pytest.mark.parametrize("word", ["bits=shuffle(1,2,3,4,5,6,7,8,9)", "bits=shuffle(range(1,10))"])
def test_shuffled_values_are_all_there_in_another_order(word, monkeypatch):
    monkeypatch.setattr("hydra.core.override_parser.types.shuffle", lambda values: values.reverse())
    assert dimension(word).values == tuple("987654321")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr=interval(0,1)", Dimension("lr", None, 0.0, 1.0)),
        ("lr=tag(log, interval(0.001,0.1))", Dimension("lr", None, 0.001, 0.1, is_log=True)),
        ("bits=int(interval(1,5))", Dimension("bits", None, 1.0, 5.0, 1.0, is_integer=True)),
        ("bits=tag(log,int(interval(1,64)))", Dimension("bits", None, 1.0, 64.0, 1.0, is_integer=True, is_log=True)),
        ("bits=range(2,8,2)", Dimension("bits", ("2", "4", "6"), 2.0, 6.0, 2.0, is_integer=True)),
        ("lr=range(0.1,0.4,0.1)", Dimension("lr", ("0.1", "0.2", "0.3"), 0.1, 0.3, 0.1)),
    ],
)
def test_numbers_keep_bounds_step_and_scale(word, expected):
    assert dimension(word) == expected


def test_the_ends_of_an_interval_are_texts_of_its_kind():
    assert dimension("bits=int(interval(1,5))").ends() == ("1", "5")
    assert dimension("lr=interval(0,0.5)").ends() == ("0.0", "0.5")
    assert dimension("bits=2,3").ends() == ("2", "3")


@pytest.mark.parametrize(
    "word",
    [
        "ignore=[.*down_proj]",
        "prompts=/a b/c.jsonl",
        "bits=[2,3]",
        "output=runs/{point}",
        "name=",
        "name=a,",
        "source=hub:name:split",
        "--help",
    ],
)
def test_a_word_with_one_value_is_kept_verbatim(word):
    assert read([word], []) == Words((word,), ())


@pytest.mark.parametrize("word", ["name='a,b'", 'name="a,b"'])
def test_a_quoted_text_is_one_value(word):
    assert read([word], []) == Words((word,), ())


def test_a_later_word_replaces_an_earlier_one_of_the_same_key():
    assert read(["bits=2,3", "seed=1", "bits=4"], []) == Words(("seed=1", "bits=4"), ())
    words = read(["bits=4", "seed=1", "bits=2,3"], [])
    assert words.fixed == ("seed=1",)
    assert [found.values for found in words.dimensions] == [("2", "3")]


def test_only_lists_can_be_counted():
    assert read(["bits=2,3", "seed=range(0,9)", "group_size=64"], []).is_discrete
    assert not read(["bits=2,3", "lr=interval(0,1)"], []).is_discrete


def test_a_grid_has_every_combination_once_and_the_last_option_changes_fastest():
    words = read(["bits=2,3", "seed=range(0,2)"], [])
    assert [tuple(values.values()) for values in grid(words.dimensions)] == [
        ("2", "0"),
        ("2", "1"),
        ("3", "0"),
        ("3", "1"),
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bits=range(3,3)", r"bits=range\(3,3\) is empty: expected range"),
        ("bits=range(1,5,0)", r"bits=range\(1,5,0\) is empty: expected range"),
        ("bits=int(range(0,1,0.25))", r"bits=int\(range\(0,1,0.25\)\) is empty: expected range"),
        ("lr=interval(1,1)", r"lr=interval\(1,1\) is empty .*LOW below HIGH"),
        ("lr=interval(2,1)", r"lr=interval\(2,1\) is empty .*LOW below HIGH"),
        ("lr=interval(0,inf)", r"lr=interval\(0,inf\) .*has no end"),
        ("lr=tag(log,interval(0,1))", "cannot be logarithmic: LOW must be above 0"),
        ("quantizer=glob(z*)", r"quantizer=glob\(z\*\) matches none of gptq, round_to_nearest"),
        ("model=glob(*)", "model is not chosen from a folder; glob is for quantizer"),
        ("name=choice(", r"name=choice\( is no list of values"),
        ("name=choice(a,b", r"name=choice\(a,b is no list of values"),
        ("name=choice()", r"name=choice\(\) is no list of values"),
        ("bits=range(1,3),5", r"bits=range\(1,3\),5 mixes a list with ranges"),
    ],
)
def test_a_mistake_is_named_in_one_line(word, message):
    with pytest.raises(UserError, match=message) as caught:
        read([word], ["quantizer"])
    assert "\n" not in str(caught.value)
