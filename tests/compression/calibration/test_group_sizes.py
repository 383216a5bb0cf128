import pytest

from hasten.accel.compression.calibration.group_sizes import (
    auto_group_size,
    auto_group_sizes,
    check_group_size,
    described,
    layers_of_sizes,
)
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer


@pytest.mark.parametrize(
    ("columns", "size"),
    [
        ([128], 128),
        ([4096], 128),
        ([576], 64),
        ([896], 128),
        ([1600], 64),
        ([96], 32),
        ([40], -1),
        ([1536, 576], 64),
        ([40, 72], -1),
        ([], -1),
    ],
)
def test_auto_is_the_largest_of_128_64_and_32_that_divides(columns, size):
    assert auto_group_size(columns) == size


def layer(name, columns, expert=None):
    return Layer(f"model.layers.0.{name}", name, 8, columns, name, expert)


def test_experts_share_one_size_and_other_layers_have_their_own_unless_they_have_zero_points():
    layers = [layer("q", 576), layer("up", 256), *(layer(f"experts.{n}", size, n) for n, size in enumerate((256, 96)))]
    sizes = auto_group_sizes(layers)
    assert [size.own for size in sizes.values()] == [64, 128, 32, 32]
    assert [size.shared for size in sizes.values()] == [64, 64, 32, 32]
    assert parse_level("w4gauto").of_group_size(sizes[layers[1].name]) == parse_level("w4g128")
    assert parse_level("w4gautoa").of_group_size(sizes[layers[1].name]) == parse_level("w4g64a")
    assert parse_level("s2of4w4gauto").of_group_size(sizes[layers[1].name]) == parse_level("s2of4w4g128")


def test_sizes_are_counted_by_layers():
    sizes = {"a": 128, "b": 64, "c": 128, "d": -1}
    assert described(layers_of_sizes(sizes)) == "one scale a row for 1 layer, 64 for 1 layer, 128 for 2 layers"


def test_a_size_that_does_not_divide_names_all_layers_and_the_sizes_that_do():
    layers = [layer("q", 576), layer("o", 576), layer("down", 1536), layer("other", 1024)]
    check_group_size(parse_level("w4g64"), layers)
    check_group_size(parse_level("w4gauto"), layers)
    with pytest.raises(UserError) as refusal:
        check_group_size(parse_level("w4g128"), layers)
    assert str(refusal.value) == (
        "group_size=128 does not divide the 576 columns of model.layers.0.q and 1 more (2 of 4 layers): use "
        "group_size=auto; one of 8, 16, 32, 64, which divide all layers; group_size=-1 (one scale a row); or ignore "
        "these layers"
    )


def test_where_no_size_divides_all_layers_the_message_says_so():
    with pytest.raises(UserError, match="no size divides all layers"):
        check_group_size(parse_level("s2of4w4g32"), [layer("q", 44), layer("o", 64)])
