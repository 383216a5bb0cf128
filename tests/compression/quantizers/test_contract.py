"""The contract of every quantizer in conf/quantizer."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.formats.base import LoaderScheme
from hasten.accel.compression.formats.compressed_tensors import INTEGERS, CompressedTensors
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "quantizer").glob("*.yaml"))
SCHEMES = [Scheme(4, 32), Scheme(3, 32, symmetric=True), Scheme(2, -1), Scheme(8, 64), Scheme(5, 8, symmetric=True)]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def quantizer(request):
    return instantiate(OmegaConf.load(request.param))


@pytest.fixture(params=SCHEMES, ids=lambda scheme: f"w{scheme.bits}g{scheme.group_size}s{int(scheme.symmetric)}")
def scheme(request):
    return request.param


def test_codes_and_scales_have_the_shapes_and_ranges_of_the_scheme(quantizer, scheme, weight, hessian):
    quantized = quantizer.quantize(weight, quantizer.prepare(hessian), scheme).weight
    groups = 128 // scheme.columns(128)
    assert quantized.codes.shape == (48, 128)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) <= 2**scheme.bits - 1
    assert quantized.scale.shape == quantized.zero_point.shape == (48, groups)
    assert quantized.scale.dtype == weight.dtype
    if scheme.symmetric:
        assert bool((quantized.zero_point == 2 ** (scheme.bits - 1)).all())


def test_bits_count_codes_scales_and_zero_points(quantizer, scheme, weight, hessian):
    quantized = quantizer.quantize(weight, quantizer.prepare(hessian), scheme).weight
    groups = 48 * (128 // scheme.columns(128))
    zero_points = 0 if scheme.symmetric else groups * scheme.bits
    assert quantized.bits == 48 * 128 * scheme.bits + groups * 16 + zero_points


def test_a_loader_unpacks_exactly_the_dequantized_weight(quantizer, scheme, weight, hessian):
    quantized = quantizer.quantize(weight, quantizer.prepare(hessian), scheme).weight
    loader, form = LoaderScheme(INTEGERS, scheme), CompressedTensors()
    assert torch.equal(form.unpack(form.pack(quantized, loader), loader), quantized.dequantize())


def test_more_bits_make_less_error(quantizer, weight, hessian):
    prepared = quantizer.prepare(hessian)
    errors = [float(quantizer.quantize(weight, prepared, Scheme(bits, 32)).error.sum()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_a_row_does_not_see_the_rows_stacked_with_it(quantizer, scheme, weight, hessian):
    # Layers that share an input are stacked; matrix products of other shapes may round the last bit another way.
    prepared = quantizer.prepare(hessian)
    together = quantizer.quantize(weight, prepared, scheme).weight
    alone = quantizer.quantize(weight[16:32], prepared, scheme).weight
    assert float((together.rows(16, 32).codes != alone.codes).float().mean()) < 0.01
    assert torch.equal(together.rows(16, 32).scale, alone.scale) or scheme.group_size != -1


def test_a_weight_of_zeros_comes_back_as_zeros(quantizer, scheme, weight, hessian):
    zeros = torch.zeros_like(weight)
    dequantized = quantizer.quantize(zeros, quantizer.prepare(hessian), scheme).weight.dequantize()
    assert torch.equal(dequantized, zeros)


def test_the_same_input_gives_the_same_bits(quantizer, scheme, weight, hessian):
    prepared = quantizer.prepare(hessian)
    first, second = (quantizer.quantize(weight, prepared, scheme).weight for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (9, 32), (4, 0), (4, 7)])
def test_a_scheme_out_of_range_is_refused_by_name(bits, group_size):
    with pytest.raises(UserError, match=r"bits=|group_size="):
        Scheme(bits, group_size)


def test_a_group_size_that_does_not_divide_is_refused_with_the_layer():
    with pytest.raises(UserError, match=r"group_size=96 does not divide the 128 columns of model\.layers\.0\.x"):
        Scheme(4, 96).check("model.layers.0.x", 128)
