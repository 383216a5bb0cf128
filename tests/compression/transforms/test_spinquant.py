"""SpinQuant: rotations learned on the quantized model's divergence from the original."""

import pytest
import torch

from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.cayley import cayley_step
from hasten.accel.compression.transforms.learned_rotation import RotationPass
from hasten.accel.compression.transforms.quarot import hadamard_rotation
from hasten.accel.compression.transforms.rotating import RotationFile
from hasten.accel.compression.transforms.rotation import RotatedCheckpoint, Rotation
from hasten.accel.compression.transforms.spinquant import SpinQuant
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.compression.local import contents
from tests.models import tiny

TOKENS = tiny.tokens(batch=6, length=16)


def plane(angle):
    return torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)


def test_a_cayley_step_in_a_plane_is_a_rotation_against_the_gradient():
    # Loss -sum(R * T) of a rotation R has the gradient -T; by an angle t from T it is -2 cos t.
    rotation, target = plane(torch.tensor(0.5)), plane(torch.tensor(0.0))
    moved = cayley_step(rotation, -target, 0.1)
    # Y = (G Rᵀ - R Gᵀ) / 2 has the entry sin(0.5), and the Cayley transform turns by 2 atan(rate sin(0.5) / 2).
    sine = torch.tensor(0.5, dtype=torch.float64).sin()
    torch.testing.assert_close(moved, plane(0.5 - 2 * torch.atan(0.1 * sine / 2)))


def test_rotations_stay_orthogonal_over_many_large_steps():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.eye(24, dtype=torch.float64)
    for _ in range(50):
        rotation = cayley_step(rotation, torch.randn(24, 24, generator=generator), 1.5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


def pass_of(architecture, rounding):
    plain = Rotation(torch.eye(architecture.hidden_size, dtype=torch.float64))
    folded = Architecture(RotatedCheckpoint(architecture, lambda: plain))
    names = [layer.name for block in range(folded.num_blocks) for layer in folded.linears(block)]
    return RotationPass(folded, dict.fromkeys(names, rounding))


def test_gradients_are_the_derivatives_of_the_divergence(tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, "qwen2")))
    # A change by constants in the rotated basis, whose derivative by the weights is 1, as that of roundings is taken.
    learning = pass_of(original, lambda weight: weight + 0.02 * torch.sin(torch.arange(weight.numel())).view_as(weight))
    rotation = hadamard_rotation(original, 0)
    gradient = learning.gradient(rotation.residual, rotation.heads, TOKENS[:2])
    generator = torch.Generator().manual_seed(1)
    for place, size in ((0, 64), (1, 16)):
        skew = torch.randn(size, size, generator=generator, dtype=torch.float64)
        turn = torch.linalg.matrix_exp((skew - skew.T) * 1e-3)
        divergences = []
        for turned in (turn, turn.T):
            residual, heads = rotation.residual, list(rotation.heads)
            if place == 0:
                residual = turned @ residual
            else:
                heads[1] = turned @ heads[1]
            divergences.append(learning.gradient(residual, heads, TOKENS[:2]).divergence)
        one = gradient.residual if place == 0 else gradient.heads[1]
        matrix = rotation.residual if place == 0 else rotation.heads[1]
        slope = float((one.double() * ((turn - turn.T) @ matrix)).sum())
        # Both are the difference of two divergences in float32.
        assert divergences[0] - divergences[1] == pytest.approx(slope, rel=0.02)


def test_rotations_do_not_matter_where_nothing_is_rounded(tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, "llama")))
    learning = pass_of(original, lambda weight: weight)
    rotation = hadamard_rotation(original, 0)
    gradient = learning.gradient(rotation.residual, rotation.heads, TOKENS[:2])
    assert gradient.divergence / gradient.tokens < 1e-6
    assert gradient.tokens == 2 * 15


def test_each_epoch_visits_all_sequences():
    spinquant = SpinQuant(batch=4)
    visited = [place for step in range(3) for place in spinquant.sequences(step, 6)]
    assert sorted(visited[:6]) == sorted(visited[6:]) == list(range(6))
    assert visited[:6] != visited[6:]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("original"), "llama")


def settings(source, output, **changes):
    transform = SpinQuant(learning_steps=4, batch=4)
    values = {"level": parse_level("w3g32"), "transforms": (transform,)}
    return local.settings(source, output, RoundToNearest(), **(values | changes))


def test_learning_lowers_the_divergence_on_the_sequences_that_it_saw(source, tmp_path):
    # The first step has the divergence of random Hadamard matrices, the last ones that of learned ones.
    original = Architecture(Checkpoint(source))
    local.compress(settings(source, tmp_path), TOKENS)
    learned, steps = RotationFile(tmp_path / ".hasten" / "transforms").read()
    assert steps == 4
    level, method = parse_level("w3g32"), RoundToNearest()

    def rounding(weight):
        return level.dense(level.make(method, weight, method.prepare(None)).weight)

    learning, start = pass_of(original, rounding), hadamard_rotation(original, 0)
    before = learning.gradient(start.residual, start.heads, TOKENS).divergence
    assert learning.gradient(learned.residual, learned.heads, TOKENS).divergence < 0.95 * before


def test_learning_that_is_killed_goes_on_at_its_step_with_the_same_bytes(source, tmp_path, monkeypatch):
    local.compress(settings(source, tmp_path / "whole"), TOKENS)
    usual, done = RotationFile.write, []

    def write(self, rotation, steps):
        if steps == 2 and not done:
            done.append(steps)
            raise KeyboardInterrupt
        usual(self, rotation, steps)

    monkeypatch.setattr(RotationFile, "write", write)
    with pytest.raises(KeyboardInterrupt):
        local.compress(settings(source, tmp_path / "killed"), TOKENS)
    assert RotationFile(tmp_path / "killed" / ".hasten" / "transforms").read()[1] == 1
    local.compress(settings(source, tmp_path / "killed"), TOKENS)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
