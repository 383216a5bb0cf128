import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.activations.observers.maximum import Maximum
from hasten.accel.activations.observers.squared_error import SquaredError
from hasten.accel.activations.ranges import BINS, HeadRanges, InputRange, bin_edges
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.activations.scales import AttentionScheme, input_tensors
from hasten.accel.errors import UserError
from tests.activations.schemes import SCHEMES

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "input_observer").glob("*.yaml"))
CALIBRATED = [name for name, scheme in SCHEMES.items() if scheme.is_calibrated and scheme.symmetric]


def range_of(inputs, histogram=True):
    collected = InputRange(histogram)
    collected.add(inputs)
    return collected


def normal(*shape, outlier=None):
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    if outlier is not None:
        inputs.view(-1)[7] = outlier
    return inputs


@pytest.mark.parametrize(("name", "top"), [("int8 tensor static", 127), ("fp8 tensor static", 448)])
def test_a_static_scale_is_the_maximum_over_the_largest_code(name, top):
    tensors = input_tensors(SCHEMES[name], range_of(torch.tensor([0.5, -3.0])), Maximum(), torch.float32, "layer")
    assert tensors["input_scale"].tolist() == [pytest.approx(3.0 / top, rel=1e-6)]
    assert tensors["input_scale"].shape == (1,)


def test_a_global_scale_makes_the_largest_group_scale_the_largest_fp8_number():
    tensors = input_tensors(SCHEMES["nvfp4"], range_of(torch.tensor([0.5, -3.0])), Maximum(), torch.bfloat16, "layer")
    (scale,) = tensors["input_global_scale"].tolist()
    assert tensors["input_global_scale"].dtype == torch.float32
    assert scale * 3.0 / 6.0 == 448.0


def test_dynamic_inputs_need_no_tensors():
    assert input_tensors(SCHEMES["fp8 token"], InputRange(), Maximum(), torch.float32, "layer") == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", CALIBRATED, ids=lambda name: name.replace(" ", "_"))
def test_every_observer_gives_every_scheme_a_positive_scale_that_does_not_clip_beyond_the_maximum(config, name):
    observer, scheme = instantiate(OmegaConf.load(config)), SCHEMES[name]
    for inputs in (normal(512, 16), normal(64, 16, outlier=300.0), torch.zeros(4, 16), torch.full((4, 16), 1e-38)):
        collected = range_of(inputs)
        tensors = input_tensors(scheme, collected, observer, torch.bfloat16, "layer")
        (scale,) = (float(tensor) for tensor in tensors.values())
        assert scale > 0
        assert math.isfinite(scale)
        if collected.absmax > 0:
            assert observer.limit(collected, scheme) <= collected.absmax
        rounding = InputRounding(scheme, tensors.get("input_scale"), None, tensors.get("input_global_scale"))
        assert bool(rounding(inputs).isfinite().all())


def test_the_least_squared_error_is_that_of_trying_all_limits():
    scheme, inputs = SCHEMES["int8 tensor static"], normal(4096, 16, outlier=200.0)
    observer = SquaredError()

    def error(limit):
        rounded = InputRounding(scheme, torch.tensor([limit / 127]))(inputs)
        return float((rounded - inputs).double().square().sum())

    chosen = observer.limit(range_of(inputs), scheme)
    limits = [200.0 * 2 ** (-step / 8) for step in range(65)]
    assert error(chosen) <= 1.02 * min(map(error, limits))
    assert error(chosen) < 0.8 * error(200.0)


def test_ranges_do_not_depend_on_how_inputs_are_divided():
    inputs = normal(60, 16).to(torch.bfloat16)
    whole = range_of(inputs)
    for parts in (inputs.split(7), inputs.flip(0).split(13)):
        merged = InputRange(histogram=True)
        for part in parts:
            merged.merge(InputRange.from_array(range_of(part).array()))
        assert np.array_equal(merged.array(), whole.array())
    assert int(whole.counts.sum()) == inputs.numel()
    assert whole.absmax == float(inputs.abs().max())


def test_bins_hold_the_magnitudes_between_their_edges():
    edges = bin_edges()
    collected = range_of(torch.tensor([1.0, 1.1, -1.126, 0.0]))
    used = collected.counts.nonzero()[:, 0].tolist()
    assert [float(edges[index]) for index in used] == [0.0, 1.0, 1.125]
    assert len(edges) == BINS + 1


def test_inputs_that_are_not_finite_are_refused_by_name():
    with pytest.raises(UserError, match="inputs of layer are not finite"):
        input_tensors(
            SCHEMES["fp8 tensor static"], range_of(torch.tensor([1.0, torch.inf])), Maximum(), torch.float32, "layer"
        )


def test_scales_of_keys_are_of_all_heads_or_of_each():
    ranges = HeadRanges()
    states = torch.zeros(1, 2, 3, 4)
    states[0, 0, 1, 2], states[0, 1, 0, 0] = -448.0, 44.8
    ranges.add(torch.zeros(1, 4, 3, 4), states, states / 448)
    whole = AttentionScheme("tensor").tensors(ranges, torch.float32, "attention")
    assert list(whole) == ["k_scale", "v_scale"]
    assert whole["k_scale"].tolist() == [1.0]
    by_head = AttentionScheme("attn_head", queries=True).tensors(ranges, torch.float32, "attention")
    torch.testing.assert_close(by_head["k_scale"], torch.tensor([1.0, 0.1])[:, None, None])
    assert by_head["v_scale"].shape == (2, 1, 1)
    # Queries that are always zero.
    assert by_head["q_scale"].shape == (4, 1, 1)
    assert bool((by_head["q_scale"] > 0).all())
