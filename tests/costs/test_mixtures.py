"""A mixture of 671 B parameters, by its config."""

import json
from pathlib import Path

import pytest
import torch

from hasten.accel.compression.calibration.settings import all_groups
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.costs import compression
from hasten.accel.costs.estimate import SHARED
from hasten.accel.costs.model import Model
from hasten.accel.costs.outline import open_checkpoint
from hasten.accel.models.architecture import Architecture
from tests.compression import local
from tests.costs.rates import RATES

# Dense blocks, and two of the 58 with experts: a plan of all of them takes long.
BLOCKS = 3 + 2


@pytest.fixture
def model(tmp_path):
    config = json.loads((Path(__file__).parent / "deepseek_v3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    return Model(Architecture(open_checkpoint(tmp_path), torch.bfloat16), torch.bfloat16)


def test_a_calibrator_holds_a_block_without_its_experts_and_one_of_their_layers(model):
    chosen = local.settings(Path("in"), Path("out"), scheme=Scheme(4, 128))
    groups = all_groups(model.architecture, chosen)
    work = compression.Pass(model, groups, chosen.methods, sequences=128, length=512, workers=16, shards=16)
    estimate = compression.estimate(work, RATES)
    others = (61 - BLOCKS) * model.block_elements(BLOCKS - 1)
    assert model.elements() + others == pytest.approx(671e9, rel=1e-3)
    block = model.block_bytes(model.largest_block())
    assert block == pytest.approx(11.5e9 * 2, rel=0.01)
    calibrator = next(process for process in estimate.processes if process.kind == "calibrator")
    collect = calibrator.host["collect"]
    states = collect["hidden states"] + collect["activations"]
    # The first blocks have no experts, and are larger than the others without theirs: layers of 18,432 columns.
    assert collect["weights of a block"] == model.block_bytes(0)
    assert collect["layer of an expert"] == 2 * 2 * 7168 * 2048
    # Some experts in four bits.
    assert 0 < collect["packed layers of a stage"] < block / 64
    # The rest are the sums of the widest layer, of a dense block: those of a block's experts would be three times a
    # block.
    assert sum(collect.values()) - states < 3 << 30
    for phase in calibrator.host.values():
        assert sum(phase.values()) - phase.get(SHARED, 0) < block / 6
        assert sum(phase.values()) < block
    assert model.active_share(BLOCKS - 1) == 8 / 256
