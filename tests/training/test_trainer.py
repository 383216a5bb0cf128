"""Packing keeps documents apart, and a training that resumes has the loss curve of one that was never interrupted."""

import pytest
import torch

from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.data.records import Record, Records, RecordsMeta
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.medusa import Medusa
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.trainer import Trainer, TrainSettings

FACTS = TargetFacts.of(resolve("embedded:target"))
LENGTHS = (5, 9, 16, 3, 20, 7)


@pytest.fixture
def windows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    records = Records(tmp_path / "records", RecordsMeta((-1,), 4, FACTS.hidden_size, "target"))
    made = [
        Record(
            torch.full((length,), number + 1),
            torch.ones(length, dtype=torch.bool),
            torch.randn(length, FACTS.hidden_size, generator=generator).bfloat16(),
            torch.randint(0, 64, (length, 4), generator=generator, dtype=torch.int32),
            torch.full((length, 4), -1.4, dtype=torch.float16),
        )
        for number, length in enumerate(LENGTHS)
    ]
    records.write(0, made[:3])
    records.write(1, made[3:])
    return PackedWindows(records, (-1,), 16)


def trainer_of(windows, micro_batch=2):
    torch.manual_seed(0)
    network = Medusa(depth=2).build(FACTS, DraftVocabulary(torch.arange(64), FACTS.vocabulary))
    return Trainer(Medusa(depth=2), network, windows, TrainSettings(6, batch=2, micro_batch=micro_batch))


def test_each_token_is_in_one_window_and_documents_are_segments(windows):
    batch = windows.batch(range(len(windows)))
    held = batch.segments >= 0
    assert int(held.sum()) == sum(LENGTHS)
    assert torch.bincount(batch.tokens[held])[1:].tolist() == list(LENGTHS)
    same = batch.segments[:, 1:] == batch.segments[:, :-1]
    assert torch.equal(same & held[:, 1:], (batch.tokens[:, 1:] == batch.tokens[:, :-1]) & held[:, 1:])


def test_a_resumed_training_has_the_same_losses(windows, tmp_path):
    whole = [step["loss"] for step in trainer_of(windows).train(6)]
    first = trainer_of(windows)
    before = [step["loss"] for step in first.train(3)]
    first.save(tmp_path / "state")
    again = trainer_of(windows)
    again.load(tmp_path / "state")
    assert before + [step["loss"] for step in again.train(3)] == whole
