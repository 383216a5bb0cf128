from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import make_levels, parse_level
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.n_of_m import NOfM
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.compression.trained import target_hessians, target_model
from tests.models import tiny

METHODS = [SparseGPT(), Wanda(), Magnitude()]
TOKENS = tiny.tokens(8, 16)


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def correlated():
    """Inputs (N, 64) that are correlated and of different size."""
    return normal(512, 64) @ normal(64, 64, seed=1) * torch.logspace(-1, 1, 64)


@pytest.mark.parametrize("name", ["s2of4", "s2of4w4g32"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_exactly_two_of_every_four_are_pruned_and_the_stored_form_has_them_as_zeros(method, name, correlated):
    level, weight = parse_level(name), normal(16, 64, seed=2).bfloat16()
    made = level.make(method, weight, method.prepare(hessian_of(correlated))).weight
    assert (made.pruned.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    dense = level.unpack(level.pack(made))
    assert torch.equal(dense, made.pruned.weight)
    assert not dense[~made.pruned.mask].any()
    if made.quantized is not None:
        assert torch.equal(made.quantized.dequantize(), dense)


@pytest.mark.parametrize("method", [SparseGPT(damping=1e-9), Wanda()], ids=lambda method: type(method).__name__)
def test_of_independent_inputs_the_best_of_the_six_masks_is_taken(method):
    sizes = torch.tensor([0.2, 3.0, 1.0, 0.5])
    weight = normal(64, 4, seed=3)
    mask = method.prune(weight, method.prepare(hessian_of(torch.diag(sizes))), NOfM()).weight.mask
    losses = {
        kept: sum((weight[:, column] * sizes[column]).square() for column in range(4) if column not in kept)
        for kept in combinations(range(4), 2)
    }
    best = torch.stack(list(losses.values())).argmin(0)
    for row, kept in enumerate(best.tolist()):
        assert mask[row].nonzero().flatten().tolist() == list(list(losses)[kept])


def test_magnitude_keeps_the_two_largest_of_every_four():
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.5, -1.0, 1.0, 1.0, 1.0]])
    mask = Magnitude().prune(weight, Inputs(None), NOfM()).weight.mask
    assert mask.int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]  # of equal ones the first go


def papers(weight, hessian, damping, grid=None):
    """The paper's SparseGPT for 2:4, on the inverse Hessian: the mask of a group is chosen when it is reached."""
    weight, columns = weight.double().clone(), len(hessian)
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    result = torch.zeros_like(weight)
    for k in range(columns):
        if k % 4 == 0:
            saliency = weight[:, k : k + 4].square() / inverse.diagonal()[k : k + 4].square()
            pruned = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, saliency.argsort(1)[:, :2], True)
        value = weight[:, k].masked_fill(pruned[:, k % 4], 0.0)
        if grid is not None:
            scale = grid.scale[:, k // grid.scheme.group_size].double()
            zero = grid.zero_point[:, k // grid.scheme.group_size]
            value = ((value / scale + zero).round().clamp(0, grid.scheme.top) - zero) * scale
        result[:, k] = value
        error = (weight[:, k] - value) / inverse[k, k]
        weight[:, k:] -= error[:, None] * inverse[k, k:]
    return result


@pytest.mark.parametrize("bits", [None, 4])
def test_sparsegpt_prunes_and_quantizes_as_the_papers_algorithm(bits, correlated):
    weight, hessian = normal(32, 64, seed=4), hessian_of(correlated)
    method = SparseGPT(damping=0.01)
    grid = None if bits is None else Grid.of(weight, Scheme(bits, 16, symmetric=True))
    found = method.prune(weight, method.prepare(hessian), NOfM(), grid).weight
    expected = papers(weight, hessian.mean(torch.arange(64)), 0.01, grid)
    torch.testing.assert_close(found.weight.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(found.mask | (expected != 0), found.mask)


def test_the_joint_solve_adds_less_error_than_rounding_after_pruning(correlated):
    weight, hessian = normal(32, 64, seed=5), hessian_of(correlated)
    method, scheme = SparseGPT(), Scheme(3, 16, symmetric=True)
    pruned = method.prune(weight, method.prepare(hessian), NOfM())
    grid = Grid.of(pruned.weight.weight, scheme, 24, 0.4)
    joint = method.prune(weight, method.prepare(hessian), NOfM(), grid)
    after = grid.quantize(pruned.weight.weight).dequantize()
    least = float(pruned.error.sum())
    assert float(joint.error.sum()) - least < 0.8 * (float(Inputs(hessian).power(weight - after).sum()) - least)


def test_the_sizes_are_nine_bits_and_three_and_an_eighth():
    assert parse_level("s2of4").stored_bits(128, 256, 2) == 9 * 128 * 256
    # 4 / 2 bits of codes, a bit of indices, and 16 / 128 of scales.
    assert parse_level("s2of4w4g128").stored_bits(128, 256, 2) == 3.125 * 128 * 256


def test_columns_that_four_does_not_divide_are_refused():
    with pytest.raises(UserError, match=r"level s2of4 needs a multiple of 4 columns, x has 30: ignore the layer"):
        parse_level("s2of4").check("x", 30)
    with pytest.raises(UserError, match="group_size=96 does not divide the 128 columns of x"):
        parse_level("s2of4w4g96").check("x", 128)
    with pytest.raises(UserError, match="bits=9 is out of range"):
        parse_level("s2of4w9")
    with pytest.raises(UserError, match="level=s2of4w4a is wrong"):
        parse_level("s2of4w4a")  # the zeros of a symmetric grid are exact


@pytest.mark.parametrize("name", ["s2of4", "s2of4w4g64", "s2of4w3g64"])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_on_a_trained_model_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(layer, name):
    layer, level = f"model.layers.0.{layer}", parse_level(name)
    weight = target_model().checkpoint.tensor(f"{layer}.weight")
    hessian, held_out = target_hessians("train", 16)[layer], Inputs(target_hessians("held_out", 4)[layer])
    errors = []
    for method in METHODS:
        made = level.make(method, weight, method.prepare(hessian)).weight
        lost = weight.float() - level.unpack(level.pack(made)).float()
        errors.append(float(held_out.power(lost).sum()))
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < errors[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", "llama", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["s2of4", "s2of4w4g32"])
def test_transformers_loads_a_compressed_checkpoint_with_two_zeros_in_every_four(name, source, tmp_path):
    level = parse_level(name)
    facts = local.compress(local.settings(source, tmp_path / "out", level=level, pruner=SparseGPT()), TOKENS)
    packed = Checkpoint(tmp_path / "out")
    assert packed.is_compressed == (level.loader_scheme is not None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(loaded(TOKENS).logits).all()
    for row in facts:
        weight = packed.tensor(f"{row['layer']}.weight")
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()
        assert row["stored_bits"] == level.stored_bits(*weight.shape, 2)
        assert (row["method"], row["sparsity"]) == ("SparseGPT", 0.5)


def test_a_mixture_with_grids_is_loaded_as_its_levels(source, tmp_path):
    levels = make_levels([4], [32], True, [], [], ["s2of4", "s2of4w4g32", "s2of4w3g32"])
    chosen = local.settings(source, tmp_path / "levels", levels=levels, level=levels[0], pruner=Wanda())
    local.compress(chosen, TOKENS)
    architecture = Architecture(Checkpoint(source))
    database = LevelDatabase.read(chosen.output, Task(chosen).architecture)
    assert database.levels == ["w4g32", "s2of4", "s2of4w4g32", "s2of4w3g32"]
    names = [layer.name for block in range(2) for layer in architecture.linears(block)]
    mixture = {name: database.levels[index % 4] for index, name in enumerate(names)}
    output = mixed_output(architecture, database, mixture, tmp_path / "out")
    output.open({}, overwrite=False)
    write_mixed(output, database, mixture)
    loaded, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", source))
    for name, level in mixture.items():
        original.get_submodule(name).weight.data = database.weight(name, level)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, original(TOKENS).logits)


def test_experts_that_saw_too_few_tokens_are_pruned_by_magnitude(tmp_path):
    mixture = tiny.save(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    level = parse_level("s2of4w4g32")
    chosen = local.settings(mixture, tmp_path / "out", level=level, pruner=SparseGPT(), expert_tokens=10**6)
    rows = [row for row in local.compress(chosen, TOKENS) if ".experts." in row["layer"]]
    assert rows
    for row in rows:
        assert row["method"] == "Magnitude"
        assert "fewer than 1000000: pruned by magnitude" in row["notes"][0]
