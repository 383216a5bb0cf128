"""KL divergence and perplexity are compared only within one original model, tokenizer and evaluation text."""

import json

import pytest

from hasten.jobs.report.charts import charts
from hasten.jobs.report.comparison import compare, with_quality_of_checkpoints
from hasten.jobs.report.page import html
from hasten.jobs.report.reading import read
from hasten.jobs.report.sentences import facts, summary
from tests.jobs.reports import folders

LIBRARY = {"source": "library", "sequences": 32, "sequence_length": 512, "stride": None}


def run(folder, name, model, divergence, evaluation=LIBRARY, bits=3, size=300, **more):
    """A run of `hasten compress` on a model and a text; returns its folder."""
    config = folders.config(bits, "gptq", model=model, evaluation=evaluation)
    return folders.compress(folder / name, bits, "gptq", divergence, size, config=config, **more)


def fingerprints(original, text, tokenizer="t"):
    return {
        "original": {"fingerprint": original},
        "tokenizer": {"fingerprint": tokenizer},
        "texts": {"evaluation": {"fingerprint": text}},
    }


def names(groups):
    """Names of the runs of each group, best first."""
    return [[row.entry.name for row in group.rows] for group in groups]


def test_each_model_has_a_winner_and_a_front_of_its_own(folder):
    large = [run(folder, f"large-{bits}", "/large", 0.9 / bits, bits=bits, size=100 * bits) for bits in (2, 4)]
    small = [run(folder, f"small-{bits}", "/small", 0.002 / bits, bits=bits, size=10 * bits) for bits in (2, 4)]
    groups = compare(read([*large, *small]))
    assert names(groups) == [["large-4", "large-2"], ["small-4", "small-2"]]
    assert [group.winner.entry.name for group in groups] == ["large-4", "small-4"]
    assert all(row.on_front for group in groups for row in group.rows)
    assert [row.number for group in groups for row in group.rows] == [1, 2, 3, 4]
    assert str(summary(groups[1])).startswith("original=/small: bits=4 won by KL divergence")
    assert "times lower" not in str(summary(groups[1]))
    assert facts(groups[0]) == "compress on original=/large, 2 runs: 2 finished"
    drawn = charts(groups)
    assert [chart.name for chart in drawn[:2]] == ["quality_against_size", "quality_against_size_2"]
    assert "Rows on original=/small." in drawn[1].caption
    page = html(groups, drawn, [folder], "")
    assert "compress: runs on original=/large" in page
    assert "<title>4 runs of compress: bits</title>" in page


@pytest.mark.parametrize("key", ["source", "sequences", "sequence_length", "stride"])
def test_each_text_and_its_windows_are_a_group_of_their_own(folder, key):
    other = LIBRARY | {key: {"source": "/text.jsonl"}.get(key, 7)}
    paths = [run(folder, "one", "/m", 0.5), run(folder, "two", "/m", 0.2, other), run(folder, "three", "/m", 0.4)]
    groups = compare(read(paths))
    assert names(groups) == [["three", "one"], ["two"]]
    values = ["null" if value is None else value for value in (LIBRARY[key], other[key])]
    assert [group.reference for group in groups] == [f"evaluation.{key}={value}" for value in values]


def test_runs_on_one_model_and_text_are_one_group_without_a_name(folder):
    (group,) = compare(read([run(folder, "one", "/m", 0.5), run(folder, "two", "/m/", 0.2)]))
    assert group.reference == ""
    assert group.winner.entry.name == "two"


def test_without_a_text_of_its_own_the_calibration_text_is_the_evaluation_text(folder):
    unset = LIBRARY | {"source": None}
    paths = []
    for name, source in (("one", "/a"), ("two", "/b"), ("three", "/a")):
        config = folders.config(3, "gptq", evaluation=unset, calibration={"source": source})
        paths.append(folders.compress(folder / name, 3, "gptq", 0.1, 300, config=config))
    assert names(compare(read(paths))) == [["one", "three"], ["two"]]


def test_fingerprints_decide_where_reports_have_them(folder):
    same = [
        run(folder, "there", "/m", 0.5, **fingerprints("m", "a")),
        run(folder, "here", "m", 0.4, **fingerprints("m", "a")),
    ]
    changed = run(folder, "changed", "/m", 0.1, **fingerprints("m", "b"))
    tokenizer = run(folder, "tokenizer", "/m", 0.1, **fingerprints("m", "a", "other"))
    groups = compare(read([*same, changed, tokenizer]))
    assert names(groups) == [["here", "there"], ["changed"], ["tokenizer"]]
    assert "text.fingerprint=b" in groups[1].reference
    assert "tokenizer.fingerprint=other" in groups[2].reference


def test_an_old_report_is_with_new_ones_of_the_same_options(folder):
    new = run(folder, "new", "/m", 0.5, **fingerprints("m", "a"))
    old, other = run(folder, "old", "/m", 0.4), run(folder, "other", "/n", 0.3)
    assert names(compare(read([new, old, other]))) == [["old", "new"], ["other"]]
    # Where the same options gave two texts, it is with neither.
    second = run(folder, "second", "/m", 0.5, **fingerprints("m", "b"))
    assert names(compare(read([new, second, old]))) == [["new"], ["second"], ["old"]]


def test_runs_without_a_quality_are_with_those_of_their_model(folder):
    one, two = run(folder, "one", "/a", 0.5), run(folder, "two", "/b", 0.4)
    unmeasured = run(folder, "unmeasured", "/b", None, LIBRARY | {"sequences": 0})
    report = json.loads((unmeasured / "report.json").read_text())
    report["metrics"] = {"bytes": 100}
    (unmeasured / "report.json").write_text(json.dumps(report))
    broken = folders.failed(folder / "run", "lost")
    groups = compare(read([one, two, unmeasured, broken]))
    assert names(groups)[:2] == [["one"], ["two", "unmeasured"]]
    assert groups[-1].rows[-1].entry.name == "run"


def test_a_decoded_checkpoint_is_drawn_with_runs_on_its_original(folder):
    paths = [run(folder, f"{model}-{bits}", f"/{model}", 1 / bits, bits=bits) for model in "ab" for bits in (2, 4)]
    paths += [
        folders.decode(folder / f"decode-{path.name}", str(path / "model"), "union", 50.0 + place)
        for place, path in enumerate(paths)
    ]
    groups = compare(read(paths))
    assert [group.job for group in groups] == ["compress", "compress", "decode"]
    drawn = [chart for chart in charts(with_quality_of_checkpoints(groups)) if "speed" in chart.name]
    assert [chart.name for chart in drawn] == ["quality_against_speed", "quality_against_speed_2"]
    assert "2 finished rows on original=/a" in drawn[0].alt


def test_evaluations_of_an_original_and_of_its_compressed_copies_are_one_group(folder):
    paths = []
    for name, original in (("/m", None), ("/m-w4", "/m"), ("/other-w4", "/other")):
        report = {
            "job": "evaluate",
            "config": {"model": name, "original": original, "evaluation": LIBRARY},
            "metrics": {"perplexity": 10.0, "bytes": 100},
        }
        paths.append(folders.write(folder / name.strip("/"), report))
    assert sorted(map(sorted, names(compare(read(paths))))) == [["m", "m-w4"], ["other-w4"]]
