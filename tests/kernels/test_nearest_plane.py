"""The nearest plane, by C that is compiled here, and by torch."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hasten.kernels import nearest_plane
from hasten.kernels.grid_rounding import Points
from hasten.kernels.nearest_plane import Plane, c_kernel, reference

POINTS = [Points("int", 4), Points("int", 8), Points("float", 8), Points("float", 4)]


def plane(points, columns, rows, dtype):
    """A block whose inputs are correlated, in two groups."""
    generator = torch.Generator().manual_seed(columns * rows)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    lower = torch.linalg.cholesky(inputs.T @ inputs / 400 + torch.eye(columns))
    target = torch.randn(columns, rows, generator=generator)
    scales = target.abs().amax(0).expand(2, -1) * torch.tensor([[0.8], [1.1]]) / points.top
    return Plane(
        target,
        lower / lower.diagonal(),
        scales if points.kind == "float" else 2 * scales,
        torch.full_like(scales, points.top / 2 + 0.25),
        torch.arange(columns) % 2,
        points,
        dtype,
        0.1 * torch.randn(columns, rows, generator=generator),
        torch.zeros(columns, rows, dtype=torch.uint8),
        torch.zeros(columns, rows),
        torch.zeros(columns, rows),
    )


def copied(given):
    written = {name: getattr(given, name).clone() for name in ("carried", "codes", "residual", "error")}
    return replace(given, **written)


def check(module, given, *cuts):
    """The codes are the nearest ones to the weights with what the later columns carry to them, worked in float64."""
    found = copied(given)
    for last, first in pairwise(cuts):
        module.visit(found, first, last)
    columns = cuts[0]
    for k in range(columns - 1, -1, -1):
        carried = (
            given.carried[k].double() + given.lower[k + 1 : columns, k].double() @ found.residual[k + 1 :].double()
        )
        wanted = given.target[k].double() + carried
        torch.testing.assert_close(found.error[k].double() - found.residual[k], carried, rtol=1e-4, atol=1e-4)
        scale = given.scales[given.groups[k]].double()
        value = given.target[k] - found.residual[k]
        every = torch.arange(256 if given.points.bits == 8 else 16, dtype=torch.uint8)
        grid = grid_of(given.points, every, given.zeros[given.groups[k]]).double()  # (codes, R)
        assert torch.allclose(grid[found.codes[k].long(), range(len(value))] * scale, value.double(), rtol=1e-2)
        distance = (grid * scale - wanted).abs()
        chosen = distance[found.codes[k].long(), range(len(value))]
        assert bool((chosen <= distance.amin(0) + 1e-4 * scale).all())


def grid_of(points, codes, zero):
    if points.kind == "int":
        return codes.float()[:, None] - zero
    if points.bits == 8:
        return codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9)[:, None].expand(-1, len(zero))
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat([values, -values])[codes.long()][:, None].expand(-1, len(zero))


@pytest.mark.parametrize("module", [nearest_plane, reference], ids=["kernel", "torch"])
@pytest.mark.parametrize("points", POINTS, ids=str)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (40, 7), (64, 16), (70, 51)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_column_is_rounded_to_the_nearest_value_of_what_is_left_of_it(module, points, columns, rows, dtype):
    given = plane(points, columns, rows, dtype)
    check(module, given, columns, 0)
    # In parts, as groups are reached.
    check(module, given, columns, columns // 2, 0)


def test_the_kernel_is_right_with_fewer_instructions(with_fewer_instructions):
    with_fewer_instructions(c_kernel)
    for points in POINTS:
        check(c_kernel, plane(points, 40, 35, torch.bfloat16), 40, 0)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads():
    given = plane(Points("int", 4), 40, 70, torch.bfloat16)
    before = torch.get_num_threads()
    whole = copied(given)
    nearest_plane.visit(whole, 0, 40)
    cut = {
        name: getattr(given, name)[:, 33:50].contiguous()
        for name in ("target", "scales", "zeros", "carried", "codes", "residual", "error")
    }
    part = replace(given, **cut)
    torch.set_num_threads(2)
    try:
        nearest_plane.visit(part, 0, 40)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(part.codes, whole.codes[:, 33:50])
    assert torch.equal(part.error, whole.error[:, 33:50])
