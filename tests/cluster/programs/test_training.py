"""A training that is divided over ranks, with every stage of ZeRO, is that of one process; it survives its ranks."""

import os
import signal

import pytest
import torch

from hasten.accel.decoding.drafters.heads.eagle import EagleDrafter
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.data.records import Record, Records, RecordsMeta
from hasten.accel.training.heads.draft_head import TargetFacts, TargetWeights
from hasten.accel.training.heads.eagle import Eagle
from hasten.accel.training.resumable import Plan, ResumableTraining
from hasten.accel.training.setup import SCORE, HeadSetup, Measurement
from hasten.accel.training.trainer import Trainer, TrainSettings
from hasten.cluster.actors.trainer import TrainerRank
from hasten.cluster.programs.training import GroupTrainer, train_in_groups
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup
from tests.cluster.processes import processes

pytestmark = pytest.mark.ray
TARGET = resolve("embedded:target")
FACTS = TargetFacts.of(TARGET)
HEAD = Eagle(ttt_steps=2)
# Sums over ranks and over partitions of ZeRO are in another order: last bits of float32, which grow in 6 steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
STEPS = 6


def write(folder, lengths, seed):
    """Records of random features, of which a part is to be learned: ranks have unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = HEAD.layers(FACTS)
    made = [
        Record(
            torch.randint(0, 64, (length,), generator=generator),
            torch.arange(length) >= length // 3,
            torch.randn(length, len(layers) * FACTS.hidden_size, generator=generator).bfloat16(),
            torch.randint(0, 64, (length, 4), generator=generator, dtype=torch.int32),
            torch.full((length, 4), -1.4, dtype=torch.float16),
        )
        for length in lengths
    ]
    Records(folder, RecordsMeta(layers, 4, FACTS.hidden_size, FACTS.fingerprint)).write(0, made)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="needs the extra `distributed`")
    folder = tmp_path_factory.mktemp("training")
    write(folder / "train", (5, 9, 16, 3, 20, 7, 12, 6, 15), 0)
    write(folder / "held_out", (12, 9), 1)
    return HeadSetup(HEAD, EagleDrafter(), TARGET, FACTS, folder / "train", folder / "held_out", 16, 64, 4, 4, seed=0)


SETTINGS = TrainSettings(STEPS, batch=4, micro_batch=2, clip=0.5)


def alone(setup):
    """The training in this process."""
    windows = setup.windows()
    network = setup.network(setup.vocabulary(windows), TargetWeights.of(TARGET), torch.device("cpu"))
    return Trainer(setup.head, network, windows, SETTINGS)


@pytest.fixture(scope="module")
def steps(setup, tmp_path_factory):
    """Losses and norms of all steps in one process, and its checkpoint after three."""
    torch.set_num_threads(1)
    folder, trainer = tmp_path_factory.mktemp("alone"), alone(setup)
    first = trainer.train(3)
    trainer.save(folder)
    return first + trainer.train(3), folder


def same(found, expected):
    for step, other in zip(found, expected, strict=True):
        assert step.keys() == other.keys()
        for name in step:
            torch.testing.assert_close(step[name], other[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_every_stage_has_the_losses_and_the_checkpoints_of_one_process(setup, steps, tmp_path, ray_session):
    expected, before = steps
    group = ProcessGroup(TrainerRank, 2, ActorResources(1), (setup, SETTINGS, 2, "cpu", 1))
    try:
        for stage in range(4):
            group.call("prepare", stage)
            same(group.call("train", 3)[0], expected[:3])
            folder = tmp_path / str(stage)
            group.call("save", folder)
            group.call("train", 1)
            # Both ways: one process goes on from the ranks' checkpoint, and the ranks from its.
            again = alone(setup)
            again.load(folder)
            same(again.train(3), expected[3:])
            assert group.call("load", before) == [3, 3]
            same(group.call("train", 3)[0], expected[3:])
    finally:
        group.close()


def test_a_killed_rank_changes_no_loss_and_no_measurement(setup, steps, tmp_path, ray_session):
    rows, killed, losses = [], [], {}
    plan = Plan(STEPS, (0,), checkpoint_steps=2)

    def report(step, parts):
        losses.setdefault(step, []).append(parts["loss"])
        if step == 3 and not killed:
            killed.append(processes("TrainerRank")[-1])
            os.kill(killed[0].pid, signal.SIGKILL)

    def training_of(trainer):
        return ResumableTraining(trainer, plan, tmp_path, trainer.measure, SCORE, report, rows.append)

    done = train_in_groups(lambda: GroupTrainer(setup, SETTINGS, 2, 2, "cpu", ActorResources(1)), training_of, tmp_path)
    expected = [step["loss"] for step in steps[0]]
    torch.testing.assert_close(done.training.progress.losses, expected, **CLOSE)
    assert [len(times) for times in losses.values()] == [1, 1, 2, 1, 1, 1], "the third step was done again"
    # Half of the moments of one process; steps are counted apart.
    trainer = alone(setup)
    trainer.train(1)
    assert done.optimizer_bytes < 0.51 * trainer.optimizer_bytes()
    vocabulary, weights = setup.vocabulary(setup.windows()), TargetWeights.of(TARGET)
    network = setup.network(vocabulary, weights, torch.device("cpu"))
    untrained = Measurement(setup, vocabulary, weights.embedding, network)(alone(setup).weights())
    assert rows[0] == {"step": 0, "branch": False, "trained_steps": 0, **untrained}
