"""Plans of runs that compress output layer and embedding, compared with what the runs write."""

import pytest
import torch

from hasten.accel.compression.calibration.outer import make_outer_levels
from hasten.accel.compression.calibration.settings import all_groups
from hasten.accel.compression.levels.level import make_levels
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.costs.compression import Pass, estimate
from hasten.accel.costs.files import checkpoint_files, database_files
from hasten.accel.costs.method import hessian_bytes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression.local import compress, settings
from tests.costs.rates import RATES
from tests.models import tiny


@pytest.mark.parametrize(("tied", "head", "embedding"), [(False, [6], [8]), (False, [], [4]), (True, [8], [])])
def test_tensors_of_a_checkpoint_are_planned_to_the_byte(tmp_path, tied, head, embedding):
    folder = tiny.save(tmp_path / "model", "llama", dtype=torch.bfloat16, tie_word_embeddings=tied)
    outer = make_outer_levels(head, embedding, 32, 32)
    chosen = settings(folder, tmp_path / "out", RoundToNearest(), scheme=Scheme(4, 32, True), outer=outer)
    compress(chosen, tiny.tokens(1))
    architecture = Architecture(Checkpoint(folder))
    found = checkpoint_files(architecture, all_groups(architecture, chosen))
    shards = (tmp_path / "out").glob("*.safetensors")
    assert found["blocks"] + found["embedding and head"] == sum(file.stat().st_size for file in shards)


def test_a_database_is_planned_within_two_percent(folder, model, tmp_path):
    levels = make_levels([2, 4], [32], True)
    outer = make_outer_levels([4, 8], [6], 32, 32)
    chosen = settings(folder, tmp_path / "out", RoundToNearest(), levels=levels, level=levels[0], outer=outer)
    compress(chosen, tiny.tokens(1))
    found = database_files(model.architecture, all_groups(model.architecture, chosen), levels)
    written = sum(file.stat().st_size for file in (tmp_path / "out" / "layers").iterdir())
    assert found["levels"] == pytest.approx(written, rel=0.02)


def test_a_calibrated_output_layer_costs_a_run_of_the_last_block_and_its_sums(folder, model, tmp_path):
    def planned(head, embedding):
        chosen = settings(folder, tmp_path / "out", outer=make_outer_levels(head, embedding, 32, 32))
        groups = all_groups(model.architecture, chosen)
        values = {"sequences": 8, "length": 16, "batch": 2, "workers": 1, "methods": [GPTQ()]}
        return estimate(Pass(model=model, layer_groups=groups, **values), RATES)

    def seconds(found, name):
        return next(step.cpu_seconds for step in found.steps if step.name == name)

    without, with_head, with_embedding = planned([], []), planned([8], []), planned([], [8])
    assert seconds(with_head, "forward") > seconds(without, "forward")
    assert seconds(with_embedding, "forward") == seconds(without, "forward")
    key = "sums of second moments"
    # Of 8 chunks in two halves, two sums.
    assert with_head.moved[key] - without.moved[key] == 2 * hessian_bytes(64)
    assert with_embedding.moved[key] == without.moved[key]
    for found in (with_head, with_embedding):
        assert seconds(found, "solve") > seconds(without, "solve")
