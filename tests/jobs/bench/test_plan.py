"""The table of plans and runs, and what calibrators send, counted on a tiny checkpoint."""

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.bench.measurements.planned import moved_bytes
from hasten.jobs.bench.plan import Compared, Config, _section, _worst, run
from hasten.jobs.cli.compose import compose
from hasten.jobs.descriptors.registry import jobs
from tests.models import tiny

FOUND = [
    Compared("compress", "small", {"driver": (90, 100)}, (50, 50), (101, 100), (3.0, 2.0), (8.0, 10.0)),
    Compared("decode", "small", {"verifier": (110, 100)}, None, (130, 100), (1.0, 1.0), (10.0, 10.0)),
]


def test_the_worst_ratios_leave_out_the_length_of_completions():
    assert _worst(FOUND) == pytest.approx(
        {
            "largest_error_memory": 0.1,
            "largest_error_bytes": 0.01,
            "largest_error_seconds": 0.5,
            "largest_error_cpu_seconds": 0.2,
        }
    )


def test_every_figure_has_a_row_with_its_ratio():
    rows = [line for line in _section(Config(), FOUND).splitlines() if line.startswith(("| compress", "| decode"))]
    assert len(rows) == 5 + 4
    assert rows[0] == "| compress, small | peak of driver, MB | 0 | 0 | 0.900 |"
    assert rows[3] == "| compress, small | seconds | 3.0 | 2.0 | 1.500 |"


def test_bytes_sent_by_calibrators_are_counted_for_all_blocks(tmp_path):
    tiny.save(tmp_path / "model", "llama")
    words = [
        f"model={tmp_path / 'model'}",
        f"output={tmp_path / 'out'}",
        "group_size=32",
        "calibration.sequences=4",
        "calibration.sequence_length=16",
        "workers=2",
    ]
    # Two workers, two blocks, inputs of 64 columns three times and of 128 once, float32.
    assert moved_bytes(compose("compress", jobs()["compress"].options, words)) == 2 * 2 * 4 * (3 * 64 * 64 + 128 * 128)
    assert not (tmp_path / "out").exists()


def test_a_job_that_is_not_compared_is_refused(tmp_path):
    with pytest.raises(UserError, match="jobs=pretrain is wrong: expected some of compress"):
        run(Config(run_dir=str(tmp_path / "run"), jobs=["pretrain"]))
    assert not (tmp_path / "run").exists()
