from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.quantizers.baq import ColumnwiseBAQ
from hasten.accel.compression.quantizers.columns import ColumnBits, ColumnWeight, steps
from hasten.accel.compression.result import Result
from hasten.accel.errors import UserError
from tests.compression.trained import target_hessians, target_model

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "column_quantizer").glob("*.yaml"))
MEANS = [1, 1.7, 2, 2.5, 3, 4, 6.3, 8]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def quantizer(request):
    return instantiate(OmegaConf.load(request.param))


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian


def equal(quantizer, weight, prepared, bits):
    """The same quantizer with as many bits for every column."""
    return quantizer.encode(weight, prepared, torch.full((weight.shape[1],), bits, dtype=torch.uint8))


def relative(result):
    return float(result.error.sum() / result.power.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", MEANS)
def test_the_size_is_the_mean_to_the_bit_and_known_before(quantizer, dtype, mean, weight, hessian):
    level = ColumnBits(mean)
    found = quantizer.quantize(weight.to(dtype), quantizer.prepare(hessian), level).weight
    assert found.codes.shape == (48, 128)
    assert found.codes.dtype == found.widths.dtype == torch.uint8
    assert found.scale.shape == (48,)
    assert found.scale.dtype == found.dequantize().dtype == dtype
    assert bool((found.codes.int() < 2 ** found.widths.int()).all())
    assert int(found.widths.sum()) == round(mean * 128)
    assert found.bits == level.stored_bits(48, 128, dtype.itemsize)
    assert found.bits == 48 * round(mean * 128) + 128 * 4 + 48 * 8 * dtype.itemsize


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_and_power_are_those_of_the_layers_output(dtype, act_order, weight, inputs):
    # Damping is not an error of the output, but counts as one here, as in GPTQ; it is too small to matter.
    quantizer = ColumnwiseBAQ(damping=1e-6, act_order=act_order)
    given = weight.to(dtype)
    result = quantizer.quantize(given, quantizer.prepare(hessian_of(inputs)), ColumnBits(3))
    outputs, lost = inputs @ given.float().T, inputs @ (given.float() - result.weight.dequantize().float()).T
    torch.testing.assert_close(result.power, outputs.square().mean(0), rtol=1e-3, atol=0)
    # In bfloat16 the products with a refitted scale are rounded again, here by up to a tenth of a row's error.
    rtol = 0.1 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(result.error, lost.square().mean(0), rtol=rtol, atol=0)


def test_more_bits_on_average_make_less_error(quantizer, weight, hessian):
    prepared = quantizer.prepare(hessian)
    errors = [relative(quantizer.quantize(weight, prepared, ColumnBits(half / 2))) for half in range(2, 17)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


@pytest.mark.parametrize("mean", [2, 3, 4])
def test_bits_by_column_beat_equal_bits_where_columns_differ(quantizer, mean, weight, hessian):
    prepared = quantizer.prepare(hessian)
    found = quantizer.quantize(weight, prepared, ColumnBits(mean))
    even = equal(quantizer, weight, prepared, mean)
    assert found.weight.bits == even.weight.bits
    assert relative(found) < 0.8 * relative(even)


def test_at_equal_losses_all_columns_get_equal_bits(quantizer):
    widths = quantizer.widths(torch.full((64,), 0.3, dtype=torch.float64), ColumnBits(3))
    assert widths.tolist() == [3] * 64


def test_four_times_the_loss_is_worth_a_bit():
    losses = torch.tensor([1.0, 4.0, 16.0, 64.0, 64.0, 16.0, 4.0, 1.0], dtype=torch.float64)
    # Half the binary logarithms are 0, 1, 2, 3, on average 1.5.
    assert ColumnwiseBAQ().widths(losses, ColumnBits(3.5)).tolist() == [2, 3, 4, 5, 5, 4, 3, 2]
    assert ColumnwiseBAQ(lowest=3, highest=4).widths(losses, ColumnBits(3.5)).tolist() == [3, 3, 4, 4, 4, 4, 3, 3]


def test_without_correlation_the_loud_columns_get_the_bits():
    # Uncorrelated inputs whose root mean square is 1, 4 and 16: the loss goes with its square, two bits a step.
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 4.0, 16.0]).repeat_interleave(20)
    inputs = torch.linalg.qr(torch.randn(240, 60, generator=generator)).Q * sizes
    weight = torch.randn(512, 60, generator=generator)
    quantizer = ColumnwiseBAQ(damping=1e-6)
    widths = quantizer.quantize(weight, quantizer.prepare(hessian_of(inputs)), ColumnBits(4)).weight.widths
    # The losses of 512 rows are a few per cent apart by chance, so rounding may take a bit here and give it there.
    torch.testing.assert_close(widths.float().view(3, 20).mean(1), torch.tensor([2.0, 4.0, 6.0]), rtol=0, atol=0.15)


def test_losses_of_pieces_of_rows_add_up_and_give_the_widths_of_the_whole(quantizer, weight, hessian):
    prepared, level = quantizer.prepare(hessian), ColumnBits(3)
    whole = quantizer.quantize(weight, prepared, level)
    pieces = weight.split((7, 30, 11))
    losses = sum(quantizer.losses(piece, prepared, level) for piece in pieces)
    torch.testing.assert_close(losses, quantizer.losses(weight, prepared, level), rtol=1e-3, atol=0)
    widths = quantizer.widths(losses, level)
    joined = Result.join([quantizer.encode(piece, prepared, widths) for piece in pieces]).weight
    assert torch.equal(joined.widths, whole.weight.widths)
    # Matrix products of other shapes may round the last bit another way.
    assert float((joined.codes != whole.weight.codes).float().mean()) < 0.01
    assert torch.equal(whole.rows(7, 37).weight.codes, whole.weight.codes[7:37])


def test_pieces_of_different_layers_do_not_join():
    parts = [
        ColumnWeight(torch.zeros(2, 2, dtype=torch.uint8), torch.tensor(widths, dtype=torch.uint8), torch.ones(2))
        for widths in ([2, 4], [4, 2])
    ]
    with pytest.raises(AssertionError):
        ColumnWeight.join(parts)


def test_the_same_input_gives_the_same_bits(quantizer, weight, hessian):
    first, second = (quantizer.quantize(weight, quantizer.prepare(hessian), ColumnBits(2.5)).weight for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.widths, second.widths)
    assert torch.equal(first.scale, second.scale)


def test_a_weight_worked_by_hand():
    codes = torch.tensor([[0, 0, 7], [1, 3, 4]], dtype=torch.uint8)
    found = ColumnWeight(codes, torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([1.0, 2.0]))
    expected = [[-1.595769 / 2, -1.5 * 0.995687, 3.5 * 0.586019], [1.595769, 3 * 0.995687, 0.586019]]
    torch.testing.assert_close(found.dequantize(), torch.tensor(expected))
    assert found.bits == 2 * (1 + 2 + 3) + 3 * 4 + 2 * 32


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_are_those_that_err_least_on_normal_numbers(bits):
    grid = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = (-grid.square() / 2).exp()
    top, step = 2**bits - 1, float(steps(torch.tensor([bits])))

    def error(step):
        codes = (grid / step + top / 2).round().clamp(0, top)
        return float((((codes - top / 2) * step - grid).square() * density).sum())

    assert error(step) < min(error(0.98 * step), error(1.02 * step))


def test_alone_every_weight_gets_its_nearest_value(weight):
    quantizer = ColumnwiseBAQ(refits=0)
    found = quantizer.encode(weight.float(), None, torch.full((128,), 3, dtype=torch.uint8)).weight
    values = (torch.arange(8.0) - 3.5) * 0.586019
    nearest = (weight.float()[..., None] - values * found.scale[:, None, None]).abs().argmin(-1)
    assert torch.equal(nearest.to(torch.uint8), found.codes)


def test_refits_never_raise_the_error(weight, hessian):
    rows = []
    for refits in (0, 1, 2, 3):
        quantizer = ColumnwiseBAQ(refits=refits, damping=1e-6)
        rows.append(equal(quantizer, weight.float(), quantizer.prepare(hessian), 3).error)
    for fewer, more in pairwise(rows):
        assert bool((more <= fewer * (1 + 1e-4)).all())  # sums in float32
    assert float(rows[-1].sum()) < float(rows[0].sum())


def test_a_weight_of_zeros_comes_back_as_zeros(quantizer, weight, hessian):
    zeros = torch.zeros_like(weight)
    result = quantizer.quantize(zeros, quantizer.prepare(hessian), ColumnBits(3))
    assert torch.equal(result.weight.dequantize(), zeros)
    assert result.weight.bits == ColumnBits(3).stored_bits(48, 128, 2)


def test_inputs_that_are_always_zero_get_the_fewest_bits_and_make_no_error(weight, inputs):
    quantizer = ColumnwiseBAQ(damping=1e-6)
    alive = torch.ones(128)
    alive[::4] = 0
    weight = weight.float()
    result = quantizer.quantize(weight, quantizer.prepare(hessian_of(inputs * alive)), ColumnBits(3))
    assert bool((result.weight.widths[::4] == 1).all())
    assert bool(torch.isfinite(result.weight.dequantize()).all())
    lost = (inputs * alive) @ (weight - result.weight.dequantize()).T
    torch.testing.assert_close(result.error, lost.square().mean(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_reported_and_only_weights_are_used(quantizer, bad, weight, inputs):
    broken = inputs.clone()
    broken[0, 0] = bad
    result = quantizer.quantize(weight, quantizer.prepare(hessian_of(broken)), ColumnBits(4))
    assert "columns were rounded on their own" in result.notes[0]
    blind = quantizer.quantize(weight, quantizer.prepare(None), ColumnBits(4))
    lost = (weight.float() - blind.weight.dequantize().float()).square().sum(1)
    torch.testing.assert_close(blind.error, lost, rtol=0.02, atol=0)  # bfloat16 values after the refit
    assert 0 < relative(blind) < 0.02


@pytest.mark.parametrize("wrong", [0.5, 8.5])
def test_a_mean_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=rf"column_bits={wrong} is out of range: 1 to 8"):
        ColumnBits(wrong)
    with pytest.raises(UserError, match=r"column_bits=1\.5 is out of range: 2 to 8"):
        ColumnwiseBAQ(lowest=2).check(ColumnBits(1.5))


@pytest.mark.parametrize(
    "wrong", [{"damping": 0.0}, {"act_order": "rising"}, {"lowest": 0}, {"highest": 9}, {"search": 1}, {"refits": -1}]
)
def test_wrong_hyper_parameters_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ColumnwiseBAQ(**wrong)


@pytest.mark.parametrize("mean", [2, 3, 4])
def test_on_held_out_text_a_trained_layer_errs_less_than_at_equal_bits(mean):
    name = "model.layers.0.mlp.down_proj"
    weight = target_model().checkpoint.tensor(f"{name}.weight")
    hessian, held_out = target_hessians("train", 16)[name], Inputs(target_hessians("held_out", 4)[name])
    quantizer = ColumnwiseBAQ()
    prepared = quantizer.prepare(hessian)
    found = quantizer.quantize(weight, prepared, ColumnBits(mean)).weight
    even = equal(quantizer, weight, prepared, mean).weight
    assert found.bits == even.bits
    errors = [float(held_out.power(weight - one.dequantize()).sum()) for one in (found, even)]
    assert errors[0] < errors[1]
