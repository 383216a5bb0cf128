"""`hasten export_head`: a trained head in another program's layout drafts as it did before."""

import json

import pytest
import torch

from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.heads.hydra_pp import HydraPPDrafter
from hasten.accel.decoding.drafters.heads.medusa import MedusaDrafter
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.eagle import Eagle
from hasten.accel.training.heads.hydra_pp import HydraPP
from hasten.accel.training.heads.medusa import Medusa
from hasten.jobs.cli.main import main
from tests.decoding.drafters.heads.untrained import save_untrained
from tests.training.heads.layouts.noisy import noisy

TARGET = resolve("embedded:target")
FACTS = TargetFacts.of(TARGET)


def export(head, layout, output):
    return main(["export_head", str(head), "--layout", layout, "--target", "org/name", "--output", str(output)])


@pytest.mark.parametrize(
    ("head", "drafter", "layout"),
    [
        (Medusa(depth=2), MedusaDrafter, "medusa"),
        (HydraPP(depth=2, blocks=3, shares_blocks=True), HydraPPDrafter, "hydra"),
    ],
    ids=["medusa", "hydra_pp"],
)
def test_a_folder_in_another_layout_drafts_as_the_head_does(tmp_path, capsys, head, drafter, layout):
    head.save(noisy(head, FACTS), tmp_path / "head", FACTS, {})
    assert export(tmp_path / "head", layout, tmp_path / "other") == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'other'}\n"
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    models, features = Models(FACTS.vocabulary, target_path=TARGET), torch.randn(4, FACTS.hidden_size)
    found = []
    for folder in ("head", "other"):
        memory = drafter(head=str(tmp_path / folder)).new_memory(models)
        network = memory.network
        states = [network.begin()]
        frontier = network.read(states, [features], [torch.arange(4)])
        found.append(network.step(states, frontier, torch.tensor([0]), torch.tensor([9])).logits)
    torch.testing.assert_close(found[1], found[0])


def test_wrong_input_is_named(tmp_path, capsys):
    reduced = save_untrained(Medusa(), tmp_path / "medusa")
    eagle = save_untrained(Eagle(), tmp_path / "eagle")
    for head, layout, expected in (
        (reduced, "medusa", "draft_vocabulary=0"),
        (reduced, "other", "layout=other is wrong: expected hydra or medusa"),
        (reduced, "hydra", "is a head of medusa: the layout hydra holds hydra, hydra_pp only"),
        (eagle, "medusa", "is a head of eagle: the layout medusa holds medusa only"),
        (tmp_path, "medusa", "is no folder of a trained head"),
    ):
        assert export(head, layout, tmp_path / "out") == 2
        assert expected in capsys.readouterr().err
    assert export(reduced, "medusa", tmp_path / "eagle") == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    # A refusal leaves nothing behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eagle", "medusa"]
