"""A group of calibrators that divide every block between them writes the bytes of calibrators with whole blocks."""

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.cluster.actors.divided_model import ZERO3, Division
from hasten.cluster.actors.rank_calibrator import RankCalibrator
from hasten.cluster.programs import calibration
from hasten.cluster.programs.calibration import CalibrationPass
from hasten.cluster.runtime.placement import ActorResources
from tests.cluster.failing import Die, failing
from tests.cluster.processes import processes, wait_for
from tests.compression import local
from tests.models import tiny

# Nine sequences in eight chunks: the ranks have different numbers of sequences.
TOKENS = tiny.tokens(batch=9)


@pytest.mark.soak
@pytest.mark.faults
@pytest.mark.ray
def test_a_killed_rank_ends_its_group_and_another_one_writes_the_bytes_of_one_process(
    tmp_path, monkeypatch, deepspeed, ray_session
):
    source = tiny.save(tmp_path / "m", "mixtral", dtype=torch.bfloat16)
    local.compress(local.settings(source, tmp_path / "alone"), TOKENS)
    # The first call of the third stage: the other rank waits for this one's part of a weight.
    monkeypatch.setattr(calibration, "RankCalibrator", failing(RankCalibrator, "_collect", 3, Die(tmp_path / "dead")))
    chosen = local.settings(source, tmp_path / "group")
    compression = CalibrationPass(chosen, TOKENS, 1, ActorResources(0.5), Division(2, ZERO3))
    compression.task.output.open(chosen.fingerprint(compression.task.checkpoint, TOKENS), overwrite=False)
    report = compression.run()
    assert (tmp_path / "dead").exists()
    assert report.restarts == 1
    assert report.cpu_seconds > 0
    assert local.contents(tmp_path / "group") == local.contents(tmp_path / "alone")
    wait_for(lambda: not processes("RankCalibrator"))


def test_more_ranks_than_chunks_are_refused(tmp_path):
    source = tiny.save(tmp_path / "m", "llama")
    message = "workers=3 of target_group.size=3 is more than the 8 chunks .*: use workers=2, or more calibration.shards"
    with pytest.raises(UserError, match=message):
        CalibrationPass(local.settings(source, tmp_path / "out"), TOKENS, 3, division=Division(3, ZERO3))
