from hasten.jobs.bench import memory
from hasten.jobs.bench.processes.runs import Outcome
from hasten.jobs.bench.processes.watch import Peak


def outcome(peaks):
    """A run in which these were the peaks."""
    return Outcome("folder", 1.0, 1.0, 2.0, 2.0, 0, 0, "", peaks=peaks)


OUTCOMES = {
    16: outcome({"driver": Peak(1, 400_000_000, 300_000_000), "Calibrator": Peak(2, 1_000_000_000, 900_000_000)}),
    32: outcome({"driver": Peak(1, 410_000_000, 300_000_000), "Calibrator": Peak(2, 1_040_000_000, 900_000_000)}),
}


def test_growth_is_that_of_the_largest_process():
    found = memory._metrics(OUTCOMES)
    assert found["peak_rss_bytes"] == 1_040_000_000
    assert abs(found["growth_at_double_depth"] - 0.04) < 1e-9


def test_every_kind_of_process_has_a_row_and_the_largest_comes_first():
    rows = [line for line in memory._section(memory.Config(), OUTCOMES).splitlines() if line.startswith("| ")]
    assert rows[2] == "| Calibrator | 2 | 1000 | 900 | 1040 | 900 | +4.0 % |"
    assert rows[3] == "| driver | 1 | 400 | 300 | 410 | 300 | +2.5 % |"
