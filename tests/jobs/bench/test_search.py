import pytest

from hasten.accel.compression.search.evopress import EvoPress
from hasten.accel.compression.search.random_search import RandomSearch
from hasten.accel.errors import UserError
from hasten.jobs.bench import search

CONFIG = search.Config(budgets=[2.5, 3.0])


def job(cpu_seconds, kl=None, **more):
    return {"metrics": {"cpu_seconds": cpu_seconds, "kl_divergence": kl, "peak_rss_bytes": 7} | more}


LEVELS = {"levels": job(60.0), "five": job(50.0, bytes_per_weight=2.6)}
RUNS = {
    workers: job(30.0, 0.014, candidates_per_second=rate, search_swap_seconds=1.0, search_seconds=50.0)
    for workers, rate in ((1, 2.0), (2, 3.8))
}
OTHERS = {"uniform": job(0.0, 0.02), "exact": job(5.0, 0.013), "random_search": job(28.0, 0.018)}
METRICS = search._metrics(job(40.0), LEVELS, RUNS, OTHERS)


def rows(better):
    """Rows of a table in which the second allocator is better by so much."""
    return [
        {"allocator": name, "budget": budget, "bits_per_weight": budget, "kl_divergence": kl / budget}
        for name, kl in (("uniform", 1.0), ("evopress", 1.0 - better))
        for budget in CONFIG.budgets
    ]


def test_metrics_are_computed_from_the_runs():
    wanted = {
        "levels_ratio": 1.5,
        "kl_cut": 0.3,
        "exact_kl_cut": 0.35,
        "random_search_kl_cut": 0.1,
        "two_evaluators": 1.9,
        "swap_share": 0.02,
        "same_result": True,
        "bytes_per_weight": 2.6,
    }
    assert {name: round(METRICS[name], 9) for name in wanted} == wanted


def test_every_budget_has_a_row_with_all_allocators_and_groupings():
    found = {"tables": {"none": rows(0.5), "serving": rows(0.25)}, "metrics": METRICS}
    lines = [line for line in search._section(CONFIG, found).splitlines() if line.startswith("| ")]
    assert lines[0] == "| budget | uniform, none | evopress, none | uniform, serving | evopress, serving |"
    assert lines[2] == "| 2.5 | 0.40000 (2.500) | 0.20000 (2.500) | 0.40000 (2.500) | 0.30000 (2.500) |"
    assert "| KL cut by it (the peer: 30 %) | 30.0% |" in lines
    assert "| KL of random search, its cut | 0.01800, 10.0% |" in lines


def test_the_baseline_measures_as_many_tokens_as_the_search_that_it_is_compared_with():
    options = search._baseline(search._SCHEDULE, 8)
    fields = {name.removeprefix("allocator."): value for name, value in options.items() if "." in name}
    assert options["allocator"] == "random_search"
    evopress = EvoPress(10, 12, (4, 2, 1), (512, 1024, 4096))
    assert RandomSearch(**fields).measured_tokens(8 * 512) == evopress.measured_tokens(8 * 512) == 49 * 4096


def test_the_peer_s_own_run_has_its_rows():
    peer = {"peer_search_cpu_seconds": 90.0, "peer_kl": 0.015, "peer_bytes_per_weight": 20.0}
    found = {"tables": {"none": rows(0.5), "serving": rows(0.25)}, "metrics": METRICS | peer}
    text = search._section(CONFIG, found)
    assert "| CPU s of the peer's search here, ours over it | 90.0, 0.33 |" in text
    assert "| KL of what the peer found, its cut | 0.01500, 25.0% |" in text
    assert "peer's search here" not in search._section(CONFIG, found | {"metrics": METRICS})


def test_a_folder_that_is_no_checkout_of_the_peer_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="is no checkout of EvoPress"):
        search._measure(search.Config(evopress=str(tmp_path)), tmp_path)
