"""The job on rows of a table and on reports, in this process."""

import json
from math import log2

import pytest

from hasten.jobs.cli.main import main
from tests.jobs.report import last_report


def acceptance(parameters, tokens):
    return 0.2 * log2(parameters) + 0.1 * log2(tokens) - 3.5


SWEEP = [(size, tokens) for size in (10**5, 10**6, 10**7) for tokens in (10**5, 10**6)]


def fitted(**options):
    return main(["fit_scaling", *(f"{key}={value}" for key, value in options.items())])


def test_a_table_gives_its_law_the_best_draft_and_a_plot(folder, capsys):
    lines = ["parameters,train_tokens,tau", *(f"{n},{d},{acceptance(n, d)}" for n, d in SWEEP)]
    (folder / "drafts.csv").write_text("\n".join(lines) + "\n")
    assert fitted(rows=folder / "drafts.csv", acceptance="tau", target_ms=20) == 0
    report, run_dir = last_report(capsys)
    assert report["coefficients"]["parameters"]["value"] == pytest.approx(0.2)
    assert report["coefficients"]["tokens"]["value"] == pytest.approx(0.1)
    assert report["metrics"]["r_squared"] == pytest.approx(1.0)
    speeds = [draft["speed_up"]["value"] for draft in report["drafts"]]
    assert report["best"]["speed_up"]["value"] == report["metrics"]["speed_up"] == max(speeds)
    assert (run_dir / "laws.png").is_file()


def test_reports_of_trainings_give_the_same_law(folder, capsys):
    for number, (size, tokens) in enumerate(SWEEP):
        point = folder / "sweep" / str(number)
        point.mkdir(parents=True)
        metrics = {"parameters": size, "train_tokens": tokens, "tokens_per_step": acceptance(size, tokens)}
        report = {"job": "train", "config": {"train": {"batch": 8}}, "metrics": metrics}
        (point / "report.json").write_text(json.dumps(report))
    assert fitted(rows=folder / "sweep", batch="train.batch") == 0
    report, _ = last_report(capsys)
    assert report["coefficients"]["parameters"]["value"] == pytest.approx(0.2)
    assert report["constant"] == {"batch": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameters,tokens_per_step\n1,2\n", "a law needs drafts that differ"),
        ("parameters,tau\n1,2\n", "has no column tokens_per_step: it has parameters, tau; give acceptance=COLUMN"),
        ("parameters,tokens_per_step\nbig,2\n", "line 2: parameters=big is no number"),
        ("parameters,tokens_per_step\n", "holds no rows"),
    ],
)
def test_a_wrong_table_is_refused_and_leaves_nothing_behind(folder, capsys, text, words):
    (folder / "rows.csv").write_text(text)
    assert fitted(rows=folder / "rows.csv") == 2
    assert words in capsys.readouterr().err
    assert not (folder / "runs").exists()
