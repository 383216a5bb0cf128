"""The contract of every kind of level; kinds and names are discovered in accel/compression/levels/kinds."""

from functools import cache

import pytest
import torch

from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.level import level_kinds, parse_level
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.compression.quantizers.baq import ColumnwiseBAQ
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer

METHODS = (GPTQ(), RoundToNearest(), ColumnwiseBAQ(), SparseGPT(), Wanda(), Magnitude())
NAMES = [example for kind in level_kinds() for example in kind.examples]
COLUMNS = 256


@pytest.fixture(params=NAMES)
def level(request):
    return parse_level(request.param)


@pytest.fixture(scope="module")
def hessian():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    found = Hessian(COLUMNS)
    found.add(torch.randn(1024, COLUMNS, generator=generator) @ mix)
    return found


def weight_of(rows, dtype=torch.bfloat16, seed=1):
    return (torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def methods_of(level):
    return [method for method in METHODS if isinstance(method, level.family)] or [level.default_method()]


@pytest.fixture(scope="module")
def solution(hessian):
    """Function that solves a level for one weight of this many rows; what was solved before is not solved again."""

    @cache
    def solve(level, rows, dtype):
        return solved(level, {"a": weight_of(rows, dtype)}, hessian)["a"].weight

    return lambda level, rows=16, dtype=torch.bfloat16: solve(level, rows, dtype)


def solved(level, weights, hessian, method=None):
    method = method or methods_of(level)[0]
    layers = [Layer(name, name, len(weight), COLUMNS, "group", None) for name, weight in weights.items()]
    return level.solve(method, layers, lambda layer: weights[layer.name], method.prepare(hessian), "cpu")


def same(tensors, others):
    """Whether tensors by name have equal bytes; torch compares no FP8."""
    if tensors.keys() != others.keys():
        return False
    pairs = [(tensor, others[name]) for name, tensor in tensors.items()]
    return all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in pairs
    )


def packed_bits(stored):
    return 8 * sum(tensor.nbytes for name, tensor in stored.items() if name != "weight_shape")


def test_a_name_parses_to_its_level_and_in_one_kind_only():
    for name in NAMES:
        assert parse_level(name).name == name
        assert parse_level(name) == parse_level(name)
        assert sum(kind.parse(name) is not None for kind in level_kinds()) == 1
    assert len({parse_level(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", ["x", "", "w", "w4g", "keep", "s", "W4", "w4 g128"])
def test_a_wrong_name_is_refused_with_examples_of_names(name):
    with pytest.raises(UserError, match=rf"^extra_levels={name} is wrong: expected a name like .*w4g128.* or "):
        parse_level(name, "extra_levels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_tensors_match_stored_tensors_and_stored_bits(level, solution, dtype):
    # 16 rows and 256 columns: nothing is padded.
    weight = solution(level, dtype=dtype)
    stored = level.pack(weight)
    assert weight.bits == level.stored_bits(16, COLUMNS, dtype.itemsize) == packed_bits(stored)
    announced = level.stored_tensors(16, COLUMNS, dtype)
    assert 8 * sum(tensor.nbytes for tensor in announced if tensor.name != "weight_shape") == weight.bits
    for tensor in announced:
        if tensor.name in stored:
            assert (stored[tensor.name].dtype, tuple(stored[tensor.name].shape)) == (tensor.dtype, tensor.shape)


def test_padding_is_less_than_a_word_for_every_row_or_column_of_a_tensor(level, solution):
    weight = solution(level, rows=19)
    stored = level.pack(weight)
    assert 0 <= packed_bits(stored) - weight.bits < 32 * COLUMNS * len(stored)
    assert weight.bits == level.stored_bits(19, COLUMNS, 2)


def test_a_checkpoint_holds_the_weight_that_the_database_holds(level, solution):
    stored = level.pack(solution(level))
    dense, scheme = level.unpack(stored), level.loader_scheme
    tensors = level.checkpoint_tensors(stored)
    assert dense.shape == (16, COLUMNS)
    assert dense.dtype == torch.bfloat16
    loaded = tensors["weight"] if scheme is None else CompressedTensors().unpack(tensors, scheme)
    assert torch.equal(loaded, dense)
    if level.is_loaded_packed:
        assert same(tensors, stored)


def test_compressed_tensors_packs_the_weight_to_the_same_bytes(level, solution):
    scheme = level.loader_scheme
    if scheme is None or not scheme.weights.symmetric:
        pytest.skip("the library has no compressor for it, or wants zero points in another form")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    # float32, so that codes are not moved by rounding of the dense weight.
    weight = solution(level, dtype=torch.float32)
    stored = level.checkpoint_tensors(level.pack(weight))
    groups = CompressedTensors().announce({"a": scheme}, [], experts=False)["config_groups"]
    described = QuantizationScheme.model_validate(groups["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.packing)
    opened = compressor.decompress(dict(stored), described)
    assert torch.equal(opened["weight"], level.unpack(level.pack(weight)))
    given = {name: tensor.float() for name, tensor in opened.items() if name in {"weight", *stored} - {"weight_shape"}}
    assert same(compressor.compress(given, described), stored)


def test_the_inputs_of_a_level_are_those_that_loaders_are_told(level):
    scheme = level.loader_scheme
    assert level.inputs == (None if scheme is None else scheme.inputs)


def test_the_error_is_that_of_the_weight_that_is_unpacked(level, hessian):
    given = weight_of(16)
    for method in methods_of(level):
        if method.needs_hessian:
            result = solved(level, {"a": given}, hessian, method)["a"]
            lost = given.float() - level.unpack(level.pack(result.weight)).float()
            mean = hessian.mean(torch.arange(COLUMNS))
            # GPTQ and BAQ count the damping of 1 % as well, which is up to a sixth of so small an error.
            torch.testing.assert_close(result.error, ((lost @ mean) * lost).sum(1), rtol=0.2, atol=0)


def test_layers_solved_together_get_the_same_result_as_alone(level, hessian):
    weights = {"a": weight_of(16), "b": weight_of(24, seed=2)}
    for weight in weights.values():
        # The largest magnitude, by which some levels choose a scale for all layers of a group.
        weight[0, 0] = 0.5
    together = solved(level, weights, hessian)
    for name, weight in weights.items():
        alone = solved(level, {name: weight}, hessian)[name]
        torch.testing.assert_close(together[name].error, alone.error, rtol=1e-3, atol=0)


def test_the_same_input_gives_the_same_bytes(level, hessian, solution):
    again = solved(level, {"a": weight_of(16)}, hessian)["a"].weight
    assert same(level.pack(solution(level)), level.pack(again))


def test_without_statistics_a_fallback_makes_the_level_and_says_so(level):
    for method in methods_of(level):
        stand_in, done = level.without_statistics(method)
        assert done
        result = level.make(stand_in, weight_of(16), stand_in.prepare(None))
        assert result.weight.bits == level.stored_bits(16, COLUMNS, 2)


def test_facts_are_plain_and_name_the_bits(level, solution):
    facts = level.facts(solution(level))
    assert float(facts["bits"]) > 0
    assert not any(isinstance(value, torch.Tensor) for value in facts.values())


def test_a_level_unpacks_what_the_level_of_its_experts_packed(level, solution):
    own = level.of_expert()
    stored = own.pack(solution(own))
    assert torch.equal(level.unpack(stored), own.unpack(stored))
