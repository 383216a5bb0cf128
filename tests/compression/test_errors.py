"""The error that every method reports: of the stored weight, on the collected Hessian, without damping."""

import pytest
import torch

from tests.compression.methods import SOLVES, hessian_of, inputs_of, method_of, solved, weight_of

CASES = {
    "many tokens": inputs_of(),
    "fewer tokens than columns": inputs_of(tokens=40),
    "dead columns": inputs_of(dead=range(0, 96, 5)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("path", "name"), SOLVES)
def test_the_error_is_that_of_the_stored_weights_output_without_damping(path, name, case, dtype):
    inputs, weight = CASES[case], weight_of(dtype)
    result, stored = solved(path, name, weight, hessian_of(inputs))
    error, power = (
        (part.double() @ inputs.double().T).square().mean(1) for part in (weight.float() - stored.float(), weight)
    )
    assert result.of_output
    torch.testing.assert_close(result.power.double(), power, rtol=1e-4, atol=0)
    # Sums in float32; the damping's part is many times larger where there are fewer tokens than columns.
    torch.testing.assert_close(result.error.double(), error, rtol=1e-3, atol=1e-6 * float(power.max()))


@pytest.mark.parametrize("bad", ["no statistics", "infinite", "indefinite"])
@pytest.mark.parametrize(("path", "name"), SOLVES)
def test_an_error_that_is_not_of_the_output_says_so(path, name, bad):
    weight, hessian = weight_of(torch.float32), hessian_of(inputs_of())
    if bad == "infinite":
        next(hessian.panels())[3, 3] = torch.inf
    if bad == "indefinite":
        next(hessian.panels())[5, 6] = next(hessian.panels())[6, 5] = 1e12
    if bad == "no statistics":
        if method_of(path).needs_hessian and path.parent.name != "column_quantizer":
            pytest.skip("needs statistics")
        hessian = None
    result, stored = solved(path, name, weight, hessian)
    lost = weight - stored
    if result.of_output:
        assert bad == "indefinite"
        torch.testing.assert_close(result.error, hessian.power(lost), rtol=1e-3, atol=0)
    else:
        assert bad != "indefinite"
        torch.testing.assert_close(result.error, lost.square().sum(1), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(result.power, weight.square().sum(1), rtol=1e-4, atol=0)


DEAD = (7, 40, 41, 90)


@pytest.mark.parametrize("input_size", [0.0, 1e-8], ids=["zero", "negligible"])
@pytest.mark.parametrize(("path", "name"), SOLVES)
def test_large_weights_of_dead_inputs_change_nothing(path, name, input_size):
    inputs = inputs_of(dead=DEAD)
    inputs[:, list(DEAD)] = input_size * torch.randn(len(inputs), len(DEAD), generator=torch.Generator().manual_seed(2))
    weight = weight_of(torch.float32)
    zeroed, large = weight.clone(), weight.clone()
    zeroed[:, list(DEAD)], large[:, list(DEAD)] = 0.0, 3.0
    errors = []
    for one in (zeroed, large):
        result, _ = solved(path, name, one, hessian_of(inputs))
        errors.append(float(result.error.sum()))
    if path.stem == "magnitude":
        # The method compares weights alone, and keeps the large ones.
        assert errors[1] > errors[0]
    else:
        assert errors[1] == pytest.approx(errors[0], rel=0.03)
