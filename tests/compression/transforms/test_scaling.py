"""AWQ and SmoothQuant: their formulas, and the folding of scales."""

from types import SimpleNamespace

import pytest
import torch

from hasten.accel.compression.calibration.layer_groups import Group, make_layer_groups
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.awq import AWQ
from hasten.accel.compression.transforms.base import BlockView, GroupInputs
from hasten.accel.compression.transforms.edits import Replace, ScaleColumns, ScaleRows, edited, read_edits, write_edits
from hasten.accel.compression.transforms.scaling import SiteInputs, folded
from hasten.accel.compression.transforms.smoothquant import SmoothQuant
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.scale_sites import LINEAR, ScaleSite
from tests.models import tiny

COLUMNS = 32


def statistics_of(inputs):
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    hessian.add_magnitudes(inputs)
    return hessian


def site_of(weight, inputs, heads=None):
    """A view of one layer with this weight and these inputs, and its site."""
    layer = Layer("layer", "layer", *weight.shape, "layer")
    group = Group(0, (layer,), parse_level("w3"))
    site = ScaleSite("layer", (layer,), (), LINEAR, ("source.weight",), 0, heads)
    tensors = {"layer.weight": weight}
    checkpoint = SimpleNamespace(tensor=tensors.__getitem__, dtype=lambda name: torch.float32)
    view = BlockView(0, None, checkpoint, (group,), (RoundToNearest(),), {}, {}, {})
    return view, SiteInputs(site, [(group, GroupInputs(statistics_of(inputs)))])


def test_smoothquant_balances_the_largest_input_and_the_largest_weight():
    weight = torch.tensor([[1.0, -4.0, 0.5], [2.0, 1.0, 0.25]])
    inputs = torch.tensor([[8.0, 1.0, 0.0], [-2.0, -4.0, 0.0]])
    scale = SmoothQuant(strength=0.5).scale(*site_of(weight, inputs))
    # sqrt(8) / sqrt(2), sqrt(4) / sqrt(4), and an input that is always zero.
    torch.testing.assert_close(scale, torch.tensor([2.0, 1.0, 1.0]))
    scale = SmoothQuant(strength=1.0).scale(*site_of(weight, inputs))
    torch.testing.assert_close(scale, torch.tensor([8.0, 4.0, 1.0]))


def test_awq_protects_the_weights_that_an_outlier_meets():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, COLUMNS, generator=generator)
    inputs = torch.randn(512, COLUMNS, generator=generator)
    inputs[:, 5] *= 50
    view, site = site_of(weight, inputs)
    scale = AWQ().scale(view, site)
    assert scale.argmax() == 5
    (group, statistics), *_ = site.groups

    def error(scaled, back):
        rounded = view.rounded(group, {"layer": scaled})["layer"]
        return float(statistics.power(rounded / back - weight).sum())

    assert error(weight * scale, scale) < 0.2 * error(weight, torch.ones(COLUMNS))


def test_awq_leaves_a_site_alone_where_no_scale_is_better():
    generator = torch.Generator().manual_seed(0)
    # Weights on the grid: any scale makes them worse.
    weight = torch.randint(-4, 4, (16, COLUMNS), generator=generator).float()
    weight[:, 0] = -4.0
    inputs = torch.randn(64, COLUMNS, generator=generator) * torch.logspace(-1, 1, COLUMNS)
    assert AWQ().scale(*site_of(weight, inputs)) is None


def test_query_heads_of_one_value_head_share_a_scale():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, 12, generator=generator), torch.randn(64, 12, generator=generator)
    _, site = site_of(weight, inputs, heads=(2, 3, 2))
    mean = inputs.abs().mean(0)
    expected = torch.cat([(mean[:3] + mean[3:6]) / 2, (mean[6:9] + mean[9:]) / 2])
    torch.testing.assert_close(site.mean(), expected)
    torch.testing.assert_close(
        site.site.expanded(torch.arange(6.0)), torch.tensor([0.0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rounding_a_norm_is_made_up_for_in_the_weights(family, tmp_path):
    # In bfloat16 the norm's weight is rounded: the scale that the columns get is the rounded one's.
    architecture = Architecture(Checkpoint(tiny.save(tmp_path / "model", family, dtype=torch.bfloat16)))
    groups = make_layer_groups(architecture, parse_level("w4g32"), (), 0, 0)[0]
    view = BlockView(0, architecture, architecture.checkpoint, groups, (), {}, {}, {})
    site = view.sites[0]
    scale = torch.rand(site.channels, generator=torch.Generator().manual_seed(0)) + 0.5
    edits = folded(view, site, scale)
    norm, columns = edits[site.source[0]][0].value, edits[f"{site.layers[0].name}.weight"][0].scale
    assert norm.dtype == torch.bfloat16
    product = (norm.float() + site.offset) * columns
    torch.testing.assert_close(product, view.tensor(site.source[0]) + site.offset, rtol=1e-6, atol=0)


def test_statistics_follow_scaled_columns():
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(64, 8, generator=generator), torch.randn(4, 8, generator=generator)
    edits = tuple(ScaleColumns(torch.rand(8, generator=generator) + 0.5) for _ in range(2))
    after = inputs / edits[0].scale / edits[1].scale
    found, expected = GroupInputs(statistics_of(inputs), edits), GroupInputs(statistics_of(after))
    torch.testing.assert_close(found.power(weight), expected.power(weight))
    torch.testing.assert_close(found.mean(), expected.mean())
    torch.testing.assert_close(found.peak(), expected.peak())


def test_edits_come_back_from_their_file_and_rows_alone_equal_those_of_the_whole(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shared = ScaleColumns(torch.rand(6, generator=generator))
    edits = {
        "a": (shared, ScaleRows(torch.rand(3, generator=generator), 2)),
        "b": (shared,),
        "c": (Replace(torch.ones(4)),),
    }
    write_edits(tmp_path / "edits.safetensors", edits)
    again = read_edits(tmp_path / "edits.safetensors")
    assert again["a"][0] is again["b"][0]
    tensor = torch.randn(8, 6, generator=generator)
    whole = edited(tensor.clone(), again["a"])
    torch.testing.assert_close(whole, edited(tensor.clone(), edits["a"]), rtol=0, atol=0)
    numbers = torch.tensor([1, 3, 4])
    rows = tensor[numbers]
    for edit in again["a"]:
        rows = edit.apply_to_rows(rows, numbers)
    assert torch.equal(rows, whole[numbers])
    assert torch.equal(edited(torch.zeros(4), again["c"]), torch.ones(4))
