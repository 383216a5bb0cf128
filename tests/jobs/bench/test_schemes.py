import pytest

from hasten.accel.errors import UserError
from hasten.jobs.bench import schemes
from hasten.jobs.bench.processes.runs import Outcome
from hasten.jobs.cli.main import main


def row(method, kl_divergence, cpu_seconds, scheme="fp8", files=0.0):
    outcome = Outcome("folder", 1.0, cpu_seconds, 1.0, cpu_seconds, 1, 1, "a", "0.14", files_cpu_seconds=files)
    return schemes.Row(scheme, method, outcome, kl_divergence, 10.0)


def test_the_peers_method_and_the_best_one_are_held_against_the_peer():
    # The peer's reading and writing count as hasten's do.
    rows = [row(schemes.PEER, 0.02, 30.0, files=10.0), row("same", 0.02, 10.0), row("better", 0.01, 30.0)]
    found = schemes.metrics(rows)
    assert found["kl_divergence_fp8"] == 0.01
    assert found["kl_ratio_fp8"] == pytest.approx(1.0)
    assert found["best_kl_ratio_fp8"] == pytest.approx(0.5)
    assert found["cpu_ratio_fp8"] == pytest.approx(0.25)
    cells = schemes._cells(rows)
    assert [(line[3], line[6]) for line in cells] == [("–", "–"), ("1.00", "0.25"), ("0.50", "0.75")]


def test_without_a_peer_there_are_no_ratios():
    rows = [schemes.Row("fp8", schemes.PEER), row("same", 0.02, 10.0)]
    assert schemes.metrics(rows) == {"kl_divergence_fp8": 0.02}
    assert schemes._cells(rows)[0][2] == "not run"
    assert schemes._cells(rows)[1][3] == "–"


def test_a_scheme_without_a_recipe_is_named():
    with pytest.raises(UserError, match="schemes=w4 is none of w4a16"):
        schemes.run(schemes.Config(schemes=["fp8", "w4"]))


def test_options_of_every_recipe_are_options_of_compress(capsys):
    assert main(["compress", "--help"]) == 0
    text = capsys.readouterr().out
    options = {name for of_scheme in schemes.RECIPES.values() for method in of_scheme.values() for name in method}
    missing = [name for name in options | {"scheme"} if f"{name}=" not in text]
    assert missing == []
