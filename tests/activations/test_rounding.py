import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from hasten.accel.activations.description import described, input_rounding, parsed
from hasten.accel.activations.rounding import InputRounding, power_of_two_scale
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError
from tests.activations.schemes import SCHEMES


@pytest.fixture(params=SCHEMES, ids=lambda name: name.replace(" ", "_"))
def scheme(request):
    return SCHEMES[request.param]


def inputs(dtype=torch.float32):
    """Inputs [2, 5, 256] with outliers, tiny groups, a token of zeros and codes' ties."""
    states = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    states[0, 0, 3] = 60.0
    states[1, 2] = 0.0
    states[1, 1] *= 1e-3
    states[0, 4, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2)
    return states.to(dtype)


def calibrated(scheme, dtype):
    tensors = {}
    if scheme.static:
        tensors["input_scale"] = torch.tensor([0.11], dtype=dtype)
        if not scheme.symmetric:
            tensors["input_zero_point"] = torch.tensor([-17], dtype=torch.int8)
    if scheme.strategy == "tensor_group":
        tensors["input_global_scale"] = torch.tensor([448 * 6 / 60.0])
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_has_the_bits_of_compressed_tensors(scheme, dtype):
    states, tensors = inputs(dtype), calibrated(scheme, dtype)
    arguments = QuantizationArgs.model_validate(described(scheme))
    scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
    if not scheme.static:
        scale, zero_point = compute_dynamic_scales_and_zp(
            states, arguments, torch.nn.Module(), tensors.get("input_global_scale")
        )
    expected = fake_quantize(states, scale, zero_point, arguments, tensors.get("input_global_scale"))
    rounded = input_rounding(scheme, tensors, "layer")(states)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, expected)
    assert not torch.equal(rounded, states)


def test_a_description_is_parsed_to_its_scheme(scheme):
    assert parsed(described(scheme), "config.json") == scheme


def test_rounded_inputs_stay_where_they_are(scheme):
    """Rounding twice is rounding once, where the scale does not depend on what was rounded."""
    if not scheme.static:
        return
    rounding = input_rounding(scheme, calibrated(scheme, torch.float32), "layer")
    once = rounding(inputs())
    torch.testing.assert_close(rounding(once), once, rtol=1e-6, atol=1e-6)


def test_a_token_does_not_depend_on_its_neighbours(scheme):
    rounding = input_rounding(scheme, calibrated(scheme, torch.float32), "layer")
    if scheme.strategy == "tensor" and not scheme.static:
        return
    states = inputs()
    assert torch.equal(rounding(states.flatten(0, 1))[7], rounding(states[1:, 2:3])[0, 0])


def test_a_gradient_passes_through_the_rounding(scheme):
    states = inputs().requires_grad_()
    rounding = input_rounding(scheme, calibrated(scheme, torch.float32), "layer")
    rounding(states).sum().backward()
    assert torch.equal(states.grad, torch.ones_like(states))


def test_a_static_scale_rounds_to_its_multiples_and_clips():
    rounding = InputRounding(InputScheme("int", 8, "tensor", static=True), torch.tensor([0.5]))
    states = torch.tensor([[0.2, 0.26, -1.1, 63.4, 100.0, -100.0]])
    assert rounding(states).tolist() == [[0.0, 0.5, -1.0, 63.5, 63.5, -64.0]]


def test_microscaling_scales_are_powers_of_two():
    absmax = torch.tensor([6.0, 7.0, 6.99, 1.0, 448.0, 0.0])
    fp4, fp8 = SCHEMES["mxfp4"], SCHEMES["mxfp8"]
    # floor(log2(6)) = 2 is the exponent of the largest E2M1 number, and 7 = 1.75 * 4 is rounded up to 8.
    assert power_of_two_scale(absmax, fp4)[:4].tolist() == [1.0, 2.0, 1.0, 0.25]
    assert power_of_two_scale(absmax, fp8)[4] == 2.0
    assert power_of_two_scale(absmax, fp4)[5] == 2.0**-127


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 6, "type": "float"}, "supported are 2 to 8 bits"),
        ({"strategy": "channel"}, "supported are"),
        ({"strategy": "token", "dynamic": False}, "supported are"),
        ({"strategy": "group", "group_size": None, "dynamic": True}, "group_size=None"),
    ],
)
def test_inputs_that_cannot_be_computed_are_refused(changes, message):
    arguments = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    with pytest.raises(UserError, match=message):
        parsed(arguments | changes, "config.json")


def test_a_missing_static_scale_is_named():
    with pytest.raises(UserError, match=r"tensor model.layers.0.q_proj.input_scale is missing"):
        input_rounding(SCHEMES["fp8 tensor static"], {}, "model.layers.0.q_proj")
