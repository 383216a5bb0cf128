"""A mixture of 671 B parameters, by its config."""

import json
from pathlib import Path

import pytest
import torch

from hasten.accel.compression.calibration.settings import all_groups
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.costs import compression
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


def test_a_calibrator_holds_one_block_and_little_more(model):
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
    assert collect["weights of a block"] == block
    # The sums of the widest layer, of a dense block: those of the experts of a block would be three times a block.
    assert sum(collect.values()) - block - states < 3 << 30
    assert model.active_share(BLOCKS - 1) == 8 / 256
