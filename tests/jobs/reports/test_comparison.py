import json

import pytest

from hasten.jobs.descriptors.metrics import texts
from hasten.jobs.report.comparison import compare, with_quality_of_checkpoints
from hasten.jobs.report.reading import read
from hasten.jobs.report.sentences import summary
from hasten.jobs.report.settings import flat, shown
from tests.jobs.reports import folders


def group(*paths):
    (found,) = compare(read(paths))
    return found


def test_settings_that_differ_between_runs_are_columns_and_the_others_are_not(folder):
    one = folders.compress(folder / "one", 3, "gptq", 0.2, 300)
    other = folders.compress(folder / "other", 4, "gptq", 0.1, 400)
    found = group(one, other)
    assert found.settings == ("bits",)
    assert [row.label for row in found.rows] == ["bits=4", "bits=3"]
    assert found.common == {
        "model": "embedded:target",
        "quantizer": "gptq",
        "quantizer.damping": "0.01",
        "calibration.sequences": "16",
    }


def test_a_hyperparameter_that_only_one_method_has_is_no_difference(folder):
    one = folders.compress(folder / "one", 3, "gptq", 0.2, 300)
    other = folders.compress(folder / "other", 3, "round_to_nearest", 0.4, 300)
    assert group(one, other).settings == ("quantizer",)


def test_runs_of_the_same_settings_go_by_their_names(folder):
    one = folders.compress(folder / "one", 3, "gptq", 0.2, 300)
    other = folders.compress(folder / "other", 3, "gptq", 0.1, 300)
    assert [row.label for row in group(one, other).rows] == ["other", "one"]


def test_columns_of_a_sweep_are_what_it_varied(folder):
    assert group(folders.sweep(folder / "sweep")).settings == ("bits", "quantizer")


def test_a_sweep_and_a_run_have_the_settings_of_both(folder):
    found = group(folders.sweep(folder / "sweep"), folders.compress(folder / "run", 3, "gptq", 0.2, 300))
    assert found.settings == ("bits", "quantizer")
    assert "bits=3 quantizer=gptq" in [row.label for row in found.rows]


def test_the_winner_is_the_best_by_the_first_objective_and_the_front_is_of_all_of_them(folder):
    found = group(folders.sweep(folder / "sweep"))
    assert [(row.entry.name, row.winner, row.on_front) for row in found.rows] == [
        ("gptq-4", True, True),
        ("round_to_nearest-4", False, False),
        ("gptq-2", False, True),
        ("round_to_nearest-2", False, False),
        ("gptq-8", False, False),
    ]
    assert found.metrics[:2] == ("kl_divergence", "bytes")


def test_an_objective_may_be_to_have_more(folder):
    slow = folders.decode(folder / "slow", "target", "prompt_lookup", 50.0)
    quick = folders.decode(folder / "quick", "target", "union", 150.0)
    found = group(slow, quick)
    assert found.winner.entry.name == "quick"
    assert str(summary(found)) == (
        "drafter=union won by tokens a second: 150, 3.0 times that of the next, drafter=prompt_lookup."
    )


def test_the_summary_names_winner_lead_and_the_other_end_of_the_front(folder):
    assert str(summary(group(folders.sweep(folder / "sweep")))) == (
        "bits=4 quantizer=gptq won by KL divergence: 0.05000 nats a token at 4 MiB, 50% lower than the next, "
        "bits=4 quantizer=round_to_nearest. 2 of 4 settings are on the Pareto front of KL divergence and size; "
        "the smallest of them is bits=2 quantizer=gptq (KL divergence 0.8000 nats a token, size 2 MiB)."
    )


def test_settings_that_share_the_best_value_are_not_told_apart(folder):
    runs = [folders.compress(folder / str(bits), bits, "gptq", 0.1, 300) for bits in (3, 4, 5)]
    assert [row.winner for row in group(*runs).rows] == [True, True, True]
    assert " and 2 others share the best KL divergence, 0.1000 nats a token." in str(summary(group(*runs)))


def test_without_divergence_the_perplexity_decides(folder):
    one = folders.compress(folder / "one", 3, "gptq", None, 300)
    other = folders.compress(folder / "other", 4, "gptq", None, 400)
    assert [each.metric for each in group(one, other).objectives] == ["perplexity"]


def test_an_objective_that_no_point_tells_is_replaced_by_the_usual_one(folder):
    folders.sweep(folder / "sweep")
    report = json.loads((folder / "sweep/report.json").read_text())
    folders.write(folder / "sweep", report | {"objectives": [{"metric": "tokens_per_second"}]})
    assert [each.metric for each in group(folder / "sweep").objectives] == ["kl_divergence"]


def test_a_value_that_is_no_number_wins_nothing(folder):
    one = folders.compress(folder / "one", 3, "gptq", float("nan"), 300)
    other = folders.compress(folder / "other", 4, "gptq", 0.3, 400)
    third = folders.compress(folder / "third", 5, "gptq", 0.4, 500)
    found = group(one, other, third)
    assert found.winner.entry.name == "other"
    assert found.rows[-1].entry.name == "one"


def test_runs_of_several_jobs_are_groups_that_are_numbered_on(folder):
    compressed = folders.compress(folder / "a", 3, "gptq", 0.2, 300)
    found = compare(read([compressed, folders.decode(folder / "b", "x", "union", 9.0)]))
    assert [(group.job, group.rows[0].number) for group in found] == [("compress", 1), ("decode", 2)]


def test_a_decoding_run_gets_the_quality_of_its_compressed_checkpoint(folder):
    compressed = folders.compress(folder / "a", 3, "gptq", 0.2, 300)
    decoded = folders.decode(folder / "b", str(compressed / "model"), "union", 9.0)
    other = folders.decode(folder / "c", str(folder / "elsewhere"), "union", 8.0)
    _, found = with_quality_of_checkpoints(compare(read([compressed, decoded, other])))
    assert [row.metric("kl_divergence") for row in found.rows] == [0.2, None]
    assert [row.metric("tokens_per_second") for row in found.rows] == [9.0, 8.0]


def test_a_method_is_named_by_its_file_and_a_nested_one_with_its_values():
    nested = {"_target_": "hasten.accel.decoding.drafters.retrieval.copy_spec.CopySpec", "gamma": 5}
    drafter = {"_target_": "hasten.accel.decoding.drafters.combined.union.Union", "drafters": [nested]}
    assert {key: shown(value) for key, value in flat({"drafter": drafter}).items()} == {
        "drafter": "union",
        "drafter.drafters": "[copy_spec 5]",
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.000192, 2.762124, None], ["0.000192", "2.762124", "–"]),
        ([12.844, 154.8], ["12.84", "154.80"]),
        ([3.0, 12345.0], ["3", "12,345"]),
        ([0.0, 1e-9, 1.5], ["0.000000", "1e-09", "1.500000"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(values, expected):
    assert texts(values) == expected
