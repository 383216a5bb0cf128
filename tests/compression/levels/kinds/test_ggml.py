import pytest
import torch

from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.ggml.types import TYPES


@pytest.fixture(scope="module")
def layer():
    """Weight of a trained layer with 256 columns, and the Hessian of its inputs: the embedded target's second block."""
    model = Architecture(Checkpoint(embedded.path("target")))
    tokens = torch.randint(3, 4096, (8, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.run_block(model.load_block(0), 0, model.embed(tokens))
        block, inputs = model.load_block(1), []
        block.mlp.gate_proj.register_forward_hook(lambda _, given, __: inputs.append(given[0].flatten(0, 1)))
        model.run_block(block, 1, hidden)
    hessian = Hessian(256)
    for part in inputs[0].split(512):
        hessian.add(part)
    return block.mlp.gate_proj.weight.detach().bfloat16(), hessian


@pytest.mark.parametrize("name", TYPES)
def test_gptq_loses_less_than_rounding_on_every_type(name, layer):
    weight, hessian = layer
    level = parse_level(name)
    errors = {}
    for method in (RoundToNearest(), GPTQ(refits=0), GPTQ()):
        result = level.make(method, weight, method.prepare(hessian))
        lost = weight.float() - level.unpack(level.pack(result.weight)).float()
        # The reported error is that of the stored blocks, not of what the solver computed with.
        torch.testing.assert_close(result.error, hessian.power(lost), rtol=0.05, atol=1e-9)
        errors[method] = float(result.error.sum())
    rounded, plain, fitted = errors.values()
    assert plain < 0.75 * rounded
    assert fitted < plain


def test_rounding_weighted_by_inputs_loses_less_output_than_rounding_without(layer):
    weight, hessian = layer
    level, method = parse_level("q3_k"), RoundToNearest()
    blind = level.make(method, weight, None).weight.dequantize()
    aware = level.make(method, weight, method.prepare(hessian)).weight.dequantize()
    errors = [((weight.float() - stored).square() * hessian.diagonal()).sum() for stored in (blind, aware)]
    assert errors[1] < errors[0]


def test_a_narrow_layer_has_the_exact_size_and_a_note_of_the_type_in_its_place():
    level, weight = parse_level("q4_k"), torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = level.make(RoundToNearest(), weight, None)
    assert level.facts(result.weight) == {"bits": 5.5, "type": "q5_0"}
    assert result.weight.bits == level.stored_bits(8, 96, 2) == 8 * 96 * 5.5
    assert result.notes == ("96 columns are no multiple of 256: q5_0",)
    assert level.unpack(level.pack(result.weight)).shape == (8, 96)


def test_columns_that_32_does_not_divide_and_methods_without_blocks_are_refused():
    with pytest.raises(UserError, match=r"level q8_0 needs a multiple of 32 columns, layers\.0 has 40"):
        parse_level("q8_0").check("layers.0", 40)

    class Other(RoundToNearest):
        quantize_blocks = RoundToNearest.__mro__[1].quantize_blocks

    with pytest.raises(UserError, match="level q8_0 cannot be made by Other: use gptq or round_to_nearest"):
        parse_level("q8_0").check_method(Other())
