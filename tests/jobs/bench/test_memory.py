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


def test_a_mixture_has_a_section_of_its_own_that_says_what_a_block_has():
    config = memory.Config(hidden_size=256, intermediate_size=128, heads=4, kv_heads=2, experts=16)
    text = memory._section(config, OUTCOMES)
    # Query and output 256 x 256, key and value 128 x 256, and 16 times 3 x 256 x 128, in two bytes.
    assert (
        f"mixture of 16 experts of width 256, 128 inside, vocabulary 32000, {2 * (196608 + 1572864) / 1e6:.0f} MB"
        in text
    )
    assert memory._heading(config) != memory._heading(memory.Config())
    model = memory._model(config, 3)
    assert (model.num_hidden_layers, model.num_experts, model.moe_intermediate_size) == (3, 16, 128)
