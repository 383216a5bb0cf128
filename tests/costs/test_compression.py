"""Estimates of a calibration pass, compared with the real calibrators, and worked by hand for a tiny Llama."""

import numpy as np
import pytest
import torch

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.calibration.statistics import Hessian, Tree, split
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.levels.level import make_levels, parse_level
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.autoround import AutoRound
from hasten.accel.compression.transforms.quarot import QuaRot
from hasten.accel.compression.transforms.spinquant import SpinQuant
from hasten.accel.costs.compression import Pass, estimate, sent_sums
from hasten.accel.costs.estimate import Rates, Work
from hasten.accel.costs.files import checkpoint_files, database_files
from hasten.accel.costs.method import hessian_bytes
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.calibrator import Calibrator
from tests.compression.local import compress, settings
from tests.costs.rates import RATES
from tests.models import tiny


def planned(model, level=None, **changes):
    """The pass that tests.compression.local runs: 8 sequences of 16 tokens."""
    layer_groups = make_layer_groups(model.architecture, level or parse_level("w4g32a"), (), 0, 0)
    values = {"sequences": 8, "length": 16, "batch": 2, "workers": 1, "methods": [GPTQ()]}
    return Pass(model=model, layer_groups=layer_groups, **(values | changes))


def test_the_shapes_of_a_tiny_llama_are_worked_by_hand(model):
    # Hidden size 64, 128 inside, 4 heads of 16, 2 of them for keys: q, k, v, o, gate, up, down and two norms.
    block = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert model.block_elements(0) == block == 36_992
    assert model.block_bytes(0) == 4 * block
    assert model.inner == 128
    assert model.attention == 64
    # Two blocks, keys and values, two heads of 16, float32.
    assert model.token_bytes == 2 * 2 * 2 * 16 * 4
    assert model.hidden_bytes(8, 16) == 8 * 16 * 64 * 4
    # Products of 36,864 weights, and 16 keys for each of 64 numbers of the queries, twice.
    assert model.run(0, 32, 16, 2).flops == 32 * (2 * 36_864 + 4 * 16 * 64)


@pytest.mark.parametrize(
    ("columns", "elements"), [(64, 64 * 64), (200, 128 * 128 + 72 * 200), (600, 256 * (256 + 512) + 88 * 600)]
)
def test_sums_take_their_panels_up_to_the_diagonal(columns, elements):
    hessian = Hessian(columns)
    hessian.add(torch.ones(1, columns))
    assert hessian_bytes(columns) == 4 * elements == hessian.array().nbytes


@pytest.mark.parametrize(("chunks", "workers"), [(8, 1), (8, 2), (8, 3), (8, 8), (7, 2), (13, 5)])
def test_workers_send_as_many_sums_as_their_trees_hold(chunks, workers):
    for cut in (0, chunks // 2):
        assert sent_sums(chunks, workers, cut) == sums_of(chunks, workers, cut)


def sums_of(chunks, workers, cut):
    sent = 0
    for part in split(chunks, workers):
        tree = Tree(cut)
        for chunk in part:
            total = Hessian(1)
            total.add(torch.ones(1, 1))
            tree.add(chunk, 1, total)
        sent += len(tree.nodes)
    return sent


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_traffic_of_calibrators_is_planned_to_the_byte(folder, model, tmp_path, workers):
    chosen = settings(folder, tmp_path / "out", propagate="quantized")
    chunks = dict(enumerate(tiny.tokens(8, 16).tensor_split(8)))
    sent, keys = 0, [group.key for group in Task(chosen).layer_groups[0]]
    for part in split(8, workers):
        calibrator = Calibrator(chosen, {number: chunks[number] for number in part})
        sent += sum(sums.nbytes for found in calibrator.collect(0, keys).sums.values() for *_, sums, _ in found)
    moved = estimate(planned(model, workers=workers), RATES).moved
    assert moved["sums of second moments"] == model.blocks * sent
    assert moved["calibration tokens"] == 8 * 16 * 8


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", Scheme(4, 32)), ("opt", Scheme(8, -1)), ("mixtral", Scheme(3, 32, symmetric=True))],
)
def test_a_checkpoint_is_planned_within_two_percent_and_its_tensors_to_the_byte(family, scheme, tmp_path):
    folder = tiny.save(tmp_path / "model", family, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("x" * 1000)
    (folder / "README.md").write_text("is not copied")
    compress(settings(folder, tmp_path / "out", scheme=scheme), tiny.tokens(8, 16))
    architecture = Architecture(Checkpoint(folder))
    found = checkpoint_files(architecture, make_layer_groups(architecture, GridLevel(scheme), (), 0, 0))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    tensors = found["blocks"] + found["embedding and head"]
    assert tensors == sum(file.stat().st_size for file in shards)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert sum(found.values()) == pytest.approx(written, rel=0.02)


def test_a_level_database_is_planned_within_two_percent(folder, model, tmp_path):
    levels = make_levels([2, 4], [32], True, [0.5])
    chosen = settings(folder, tmp_path / "out", levels=levels, pruner=Magnitude(), level=levels[0])
    compress(chosen, tiny.tokens(8, 16))
    found = database_files(model.architecture, make_layer_groups(model.architecture, levels[0], (), 0, 0), levels)
    written = sum(file.stat().st_size for file in (tmp_path / "out" / "layers").iterdir())
    assert found["levels"] == pytest.approx(written, rel=0.02)


def test_memory_is_added_up_by_parts(model):
    found = estimate(planned(model), RATES)
    calibrator = next(each for each in found.processes if each.kind == "calibrator")
    collect = calibrator.host["collect"]
    assert collect["process"] == 500
    # In the attention: input, norm, query and output of 64, keys and values of 32 each.
    assert collect["hidden states"] == 8 * 16 * (4 * 64 + 2 * 32) * 4
    assert collect["weights of a block"] == 4 * 36_992
    # The widest input has 128 columns; of 8 chunks four sizes wait for their siblings.
    assert collect["sums of second moments"] == 4 * hessian_bytes(128)
    assert calibrator.peak_bytes == max(sum(parts.values()) for parts in calibrator.host.values())


def test_two_passes_hold_less_and_take_longer_than_one_in_stages(model):
    staged, two = (estimate(planned(model, staged=staged), RATES) for staged in (True, False))
    one, other = (found.processes[0].host["collect"] for found in (staged, two))
    assert other["hidden states"] == 8 * 16 * 64 * 4
    # All inputs of the block at the same time: 64 columns three times, and 128 once.
    assert other["sums of second moments"] == 4 * (3 * hessian_bytes(64) + hessian_bytes(128))
    forward = [next(step.cpu_seconds for step in found.steps if step.name == "forward") for found in (staged, two)]
    # Of two blocks the first runs twice; runs for sums alone leave the last layer out.
    layer, run = 2 * 8 * 16 * 64 * 128, model.run(0, 8 * 16, 16, 2)
    per_run = run.seconds(RATES)
    skipped = per_run - (run + Work(flops=-float(layer))).seconds(RATES)
    assert forward[0] == pytest.approx(2 * per_run - skipped)
    assert forward[1] == pytest.approx(3 * per_run - 2 * skipped)
    assert one["hidden states"] == 5 * other["hidden states"]


def test_more_workers_hold_fewer_hidden_states_each_and_send_more_sums(model):
    one, four = (estimate(planned(model, workers=workers), RATES) for workers in (1, 4))
    hidden = [each.processes[0].host["collect"]["hidden states"] for each in (one, four)]
    assert hidden[0] == 4 * hidden[1]
    # One worker sends the sums of both halves, each of four those of its own quarter.
    assert four.moved["sums of second moments"] == 2 * one.moved["sums of second moments"]
    assert four.written == one.written


def test_sums_travel_between_nodes_where_there_are_several(model):
    near, far = (estimate(planned(model, workers=4, nodes=count), RATES) for count in (1, 2))
    assert "sums between nodes" not in near.moved
    # Each of two solving nodes fetches the sums of the other one: half of all.
    assert far.moved["sums between nodes"] == near.moved["sums of second moments"]
    network = next(step for step in far.steps if step.name == "network")
    assert network.waits == pytest.approx(near.moved["sums of second moments"] / 2 / RATES.network)


def test_seconds_are_arithmetic_on_rates(model):
    work = planned(model, workers=2)
    slow, quick = (estimate(work, rates) for rates in (RATES, faster(2.0)))
    assert quick.cpu_seconds == pytest.approx(slow.cpu_seconds / 2)
    assert slow.seconds(0.5) == pytest.approx(2 * slow.seconds(1.0) - sum(step.waits for step in slow.steps))


def faster(times):
    """Rates of a machine that is faster by a factor."""
    values = vars(RATES)
    changed = {name: values[name] * times for name in ("flops", "exact_flops", "elements", "memory", "store", "read")}
    return Rates(**(values | changed | {"launch": RATES.launch / times}))


def test_on_a_gpu_states_and_factor_lie_on_the_device_and_sums_on_both(model):
    calibrator = estimate(planned(model, gpus=1, gpu_memory=80 * 10**9), RATES).processes[0]
    assert calibrator.device["collect"]["hidden states"] == 8 * 16 * 320 * 4
    assert "hidden states" not in calibrator.host["collect"]
    assert calibrator.device["solve"]["factor"] == 4 * 128 * 128 + 2 * hessian_bytes(128)
    assert "sums of second moments" in calibrator.host["collect"]


def test_a_method_without_statistics_has_no_sums(model):
    found = estimate(planned(model, parse_level("s50"), methods=[Magnitude()], sequences=0), RATES)
    assert set(found.moved) == {"packed layers"}
    assert "collect" not in found.processes[0].host
    assert not {"forward", "sums"} & {step.name for step in found.steps}
    assert np.isfinite(found.seconds())


def seconds_of(model, name, **changes):
    steps = {step.name: step for step in estimate(planned(model, **changes), RATES).steps}
    return steps[name].cpu_seconds if name in steps else 0.0


def test_rotations_are_learned_step_by_step(model):
    assert seconds_of(model, "learn rotation", transforms=[QuaRot()]) == 0.0
    one, four = (
        seconds_of(model, "learn rotation", transforms=[SpinQuant(learning_steps=steps, batch=4)]) for steps in (1, 4)
    )
    assert four == pytest.approx(4 * one)
    # Two parts of two sequences: five forwards of both blocks, rotations of their weights, logits, and reading.
    tokens = 4 * 16
    forwards = 2 * 5 * model.run(0, tokens, 16, 2).flops + 2 * model.logits(2 * tokens).flops
    rotations = 2 * 2 * 2 * 36_864 * 64 * 2 * 4
    assert one > forwards / RATES.flops + rotations / RATES.exact_flops


def test_a_block_that_is_solved_together_is_tuned_in_steps_by_one_worker(model):
    work = {"methods": [RoundToNearest()], "collects": False}
    few, many = (seconds_of(model, "solve", transforms=[AutoRound(steps=steps)], **work) for steps in (100, 300))
    more = 200 * 3 * model.run(0, 8 * 16, 16, 2).flops / RATES.flops
    assert many - few > 2 * more
    wall = {
        workers: next(
            step.seconds
            for step in estimate(planned(model, transforms=[AutoRound()], workers=workers, **work), RATES).steps
            if step.name == "solve"
        )
        for workers in (1, 2)
    }
    assert wall[1] == wall[2]
    host = estimate(planned(model, transforms=[AutoRound()], **work), RATES).processes[0].host
    assert host["tune"]["weights of a transform"] == AutoRound.block_bytes * 36_864
