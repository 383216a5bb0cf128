"""The pass that shows calibration text to cache methods, the files of statistics, and what methods make of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import conf
from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheLevel, Place, Recent
from hasten.accel.cache.budgets.prefixkv import PrefixKV
from hasten.accel.cache.budgets.uncomp import UNComp, entropy, spectral_entropy
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.calibrated import Calibrated, LayerTokens
from hasten.accel.cache.calibration import gather, merged
from hasten.accel.cache.full import Full
from hasten.accel.cache.mixed import Mixed
from hasten.accel.cache.prune.cskv import CSKV
from hasten.accel.cache.quantize.kvquant import KVQuant
from hasten.accel.cache.quantize.rotatekv import RotateKV
from hasten.accel.cache.retrieve.double_sparsity import DoubleSparsity
from hasten.accel.cache.retrieve.tidal_decode import TidalDecode
from hasten.accel.cache.segments.nonuniform import centroids_of
from hasten.accel.cache.statistics import FOLDER, Statistics, file_name, find, load, write_layers
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.kernels.attention.contract import PLAIN
from tests.models import tiny

CONFIGS = sorted((Path(conf.__file__).parent / "cache").glob("*.yaml"))
METHODS = [instantiate(OmegaConf.load(path)) for path in CONFIGS]
CALIBRATED = [method for method in METHODS if isinstance(method, Calibrated)]
TOKENS = tiny.tokens(3, 40)
HEADS, SIZE = 2, 16


@dataclass(frozen=True)
class Shows(Full, Calibrated):
    """Keeps what it is shown."""

    needs_rotary: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def observe(self, tokens):
        plain = {"plain": tokens.unrotated(tokens.keys), "key_slopes": tokens.unrotated(tokens.key_gradients)}
        shown = plain | {name: getattr(tokens, name) for name in ("keys", "values", "value_gradients")}
        return {name: part[None] for name, part in shown.items()}

    def merge(self, one, other):
        return {name: torch.cat([one[name], other[name]]) for name in one}

    def solve(self, layers):
        return list(layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "m", "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def architecture(folder):
    return Architecture(Checkpoint(folder))


@pytest.fixture(scope="module")
def shown(architecture):
    """Keys, values and gradients of the tokens, by layer."""
    (layers,) = gather(architecture, [Shows()], TOKENS, 3, 2)
    return layers


@pytest.fixture(params=CALIBRATED, ids=lambda method: type(method).__name__)
def method(request):
    return request.param


def test_a_method_sees_the_states_of_transformers_and_their_gradients(folder, shown):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = [[] for _ in shown]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _, given, own=inputs[number]: own.append(given[0]))
    output = model(TOKENS, use_cache=True)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for layer, own, cached, (states,) in zip(
        model.model.layers, shown, output.past_key_values.layers, inputs, strict=True
    ):
        torch.testing.assert_close(own["keys"], cached.keys.detach())
        torch.testing.assert_close(own["values"], cached.values.detach())
        plain = layer.self_attn.k_proj(states).unflatten(2, (HEADS, SIZE)).transpose(1, 2)
        torch.testing.assert_close(own["plain"], plain.detach())
        # The gradient of a weight is the sum of those of its outputs times its inputs.
        for name, weight in (
            ("key_slopes", layer.self_attn.k_proj.weight),
            ("value_gradients", layer.self_attn.v_proj.weight),
        ):
            slopes = own[name].transpose(1, 2).flatten(2).flatten(0, 1)
            torch.testing.assert_close(slopes.T @ states.detach().flatten(0, 1), weight.grad, rtol=1e-3, atol=1e-4)


def test_statistics_of_parts_are_those_of_the_whole(method, architecture):
    whole, *parts = (gather(architecture, [method], part, 3, 2)[0] for part in (TOKENS, *TOKENS.split(1)))
    sums = merged(method, merged(method, parts[0], parts[1]), parts[2])
    for one, other in zip(method.solve(whole), method.solve(sums), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # An eigenvector is one up to its sign.
            torch.testing.assert_close(one[name].abs(), other[name].abs(), rtol=1e-4, atol=1e-4)


def test_a_model_runs_with_the_statistics_that_were_written(method, folder, architecture, tmp_path):
    layers = method.solve(gather(architecture, [method], TOKENS, 3, 2)[0])
    read = load(method, written(method, layers, tmp_path))
    assert [sorted(own) for own in read.layers] == [sorted(own) for own in layers]
    assert all(torch.equal(one[name], own[name]) for one, own in zip(read.layers, layers, strict=True) for name in own)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    attach(model)
    budget = CacheBudget(24) if method.has_budget else None
    cache = CompressedCache(model, method, budget, read)
    with torch.no_grad():
        model(torch.cat([TOKENS] * 3, 1), past_key_values=cache)
        assert model(TOKENS[:, :1], past_key_values=cache).logits.isfinite().all()
    with pytest.raises(UserError, match="of 1 layers, the model has 2"):
        CompressedCache(model, method, budget, Statistics(read.layers[:1], {}))


def test_a_file_of_statistics_is_found_beside_the_checkpoint_and_checked(tmp_path):
    method = KVQuant(bits=2)
    assert find(method, tmp_path, None) is None
    beside = tmp_path / FOLDER / file_name(method)
    beside.parent.mkdir()
    note = {
        "method": "KVQuant",
        "settings": {"sinks": 1, "bits": 2, "outliers": 0.01},
        "model": "a",
        "checkpoint": "/m",
    }
    write_layers(beside, [{"scale": torch.ones(1)}], note)
    assert find(method, tmp_path, None) == find(method, Path("elsewhere"), beside.parent) == beside
    assert load(method, beside, ["a", "b"]).note["model"] == "a"
    with pytest.raises(UserError, match=r"of another model \(/m\): run hasten calibrate_cache"):
        load(method, beside, ["b"])
    with pytest.raises(UserError, match=r"is of KVQuant with .*'bits': 2.*, not of KVQuant with .*'bits': 3"):
        load(KVQuant(bits=3), beside, ["a"])
    with pytest.raises(UserError, match="does not exist: hasten calibrate_cache makes statistics of cache=RotateKV"):
        find(RotateKV(), tmp_path, beside.parent)
    with pytest.raises(UserError, match="cache=Full has no calibrated statistics"):
        find(Full(), tmp_path, beside)
    beside.write_bytes(b"other")
    with pytest.raises(UserError, match="holds no statistics of a cache"):
        load(method, beside)


def written(method, layers, folder):
    """Statistics of a method as the job writes them; their file."""
    note = {"method": type(method).__name__, "settings": {name: getattr(method, name) for name in method.calibrated_by}}
    write_layers(folder / file_name(method), layers, note)
    return folder / file_name(method)


def test_a_mixture_takes_the_statistics_of_its_layers_methods(folder, architecture, tmp_path):
    method = KVQuant(bits=2, residual=0, block=8)
    mixture = Mixed((CacheLevel(Full()), CacheLevel(method)))
    layers = method.solve(gather(architecture, [method], TOKENS, 3, 2)[0])
    beside = tmp_path / FOLDER
    beside.mkdir()
    assert find(mixture, tmp_path, None) is None
    file = written(method, layers, beside)
    assert find(mixture, tmp_path, None) == find(mixture, Path("elsewhere"), beside) == beside
    found = load(mixture, beside)
    assert found.layers[0] == {}
    assert found.layers[1].keys() == layers[1].keys()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    attach(model)

    def logits(chosen, statistics):
        cache = CompressedCache(model, chosen, statistics=statistics)
        with torch.no_grad():
            model(TOKENS, past_key_values=cache)
            return model(TOKENS[:, :1], past_key_values=cache).logits

    # All layers alike are the method itself.
    alone, mixed = load(method, file), load(Mixed((CacheLevel(method),)), beside)
    assert torch.equal(logits(Mixed((CacheLevel(method),)), mixed), logits(method, alone))
    assert not torch.equal(logits(mixture, found), logits(mixture, None))
    with pytest.raises(UserError, match="is no folder: each method of a mixture has a file of statistics"):
        find(mixture, tmp_path, file)
    other = Mixed((CacheLevel(method), CacheLevel(RotateKV())))
    assert find(other, tmp_path, None) == beside
    with pytest.raises(UserError, match="does not exist: hasten calibrate_cache makes statistics of cache=RotateKV"):
        find(other, tmp_path, beside)
    with pytest.raises(UserError, match="the methods have no calibrated statistics"):
        find(Mixed(), tmp_path, beside)


def tokens_of(keys, values=None, queries=None, **changes):
    """A calibration sequence of keys (H, T, D), which have no rotary embedding."""
    heads, count, size = keys.shape
    place = Place(0, 1, count, None, PLAIN, {}, lambda part, positions, inverse: part)
    values = keys if values is None else values
    queries = torch.zeros(count, heads, size) if queries is None else queries
    given = LayerTokens(keys, values, queries, torch.arange(count, dtype=torch.int32), place, 1, keys, values)
    return replace(given, **changes)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kvquant_s_ranges_are_those_of_the_keys_of_all_sequences(shown, architecture):
    method = KVQuant(outliers=0.2, sinks=1)
    statistics = method.solve(gather(architecture, [method], TOKENS, 3, 2)[0])
    for own, layer in zip(statistics, shown, strict=True):
        rows = layer["plain"][:, :, 1:].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (tokens, C)
        cut = round(0.1 * len(rows))
        ordered = rows.sort(dim=0).values
        low, high = ordered[cut], ordered[-1 - cut]
        torch.testing.assert_close(own["scale"][0], (high - low) / 2)
        torch.testing.assert_close(own["middle"][0], (high + low) / 2)


def test_kvquant_stores_keys_in_the_calibrated_ranges_and_centroids():
    statistics = {
        "scale": torch.full((1, 2), 2.0),
        "middle": torch.tensor([[0.0, 1.0]]),
        "key_centroids": torch.tensor([-1.0, -0.25, 0.25, 1.0]),
        "value_centroids": torch.tensor([-1.0, 0.0, 0.5, 1.0]),
    }
    keys = torch.tensor([[[0.4, -0.9], [9.0, 1.6]]])  # of one head
    kept, values = KVQuant(bits=2).quantize(keys, keys, None, statistics)
    assert kept.dense(1).tolist() == [[[0.5, -1.0], [9.0, 1.5]]]
    assert values.centroids is statistics["value_centroids"]


def test_a_centroid_is_the_mean_of_its_numbers_weighted_by_their_squared_gradients():
    numbers = torch.tensor([0.0, 1.0, 10.0, 11.0, 20.0, 21.0, 30.0, 31.0])
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0, 5.0, 0.0, 0.0])
    assert centroids_of(numbers, 2).tolist() == [0.5, 10.5, 20.5, 30.5]
    # Where all weights are zero the centroid stays where it began.
    assert centroids_of(numbers, 2, weights).tolist() == [0.75, 10.5, 21.0, 31.0]


def test_kvquant_weights_a_number_by_its_gradient():
    keys, slopes = random(1, 9, 4), random(1, 9, 4, seed=1)
    sums = KVQuant(sinks=0, outliers=0.0).observe(tokens_of(keys, key_gradients=slopes))
    assert torch.equal(sums["key_weights"], slopes[0].square())
    assert torch.equal(sums["keys"], keys[0])


def test_rotatekv_sorts_channels_by_their_calibrated_sums():
    keys = torch.tensor([[[1.0, 5.0], [1.0, 1.0]], [[9.0, 0.0], [0.0, 3.0]]])
    method = RotateKV()
    (own,) = method.solve([method.observe(tokens_of(keys))])
    assert own["order"].tolist() == [2, 1, 3, 0]  # sums 2, 6, 9 and 3
    stored, _ = method.quantize(random(2, 32, 2), random(2, 32, 2), None, own)
    assert stored.order is own["order"]


def test_double_sparsity_measures_products_of_a_query_and_its_own_key():
    keys = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]]])
    queries = torch.tensor([[[1.0, -1.0, 9.0], [0.0, 1.0, 9.0]], [[-2.0, 8.0, 1.0], [0.0, 8.0, 0.0]]])  # (T, G, D)
    method = DoubleSparsity(channels=0.4)
    (own,) = method.solve([method.observe(tokens_of(keys, queries=queries))])
    torch.testing.assert_close(own["weight"], torch.tensor([[7.0, 4.0, 1.0]]) / 7)
    recent = Recent(random(1, 40, 3), random(1, 40, 3), torch.arange(40, dtype=torch.int32), torch.ones(2, 2, 3))
    place = Place(0, 1, 40, 4, PLAIN, statistics={"weight": torch.tensor([[0.1, 0.2, 0.9]])})
    assert method.compress([], recent, place).segments[0].channels.tolist() == [[2]]


def test_uncomp_groups_heads_by_the_entropy_of_their_calibrated_spectrum():
    keys = random(HEADS, 30, SIZE)
    method = UNComp(eigenvalues=4)
    (own,) = method.solve([method.observe(tokens_of(keys))])
    for head in range(HEADS):
        torch.testing.assert_close(spectral_entropy(own["spectrum"][head], 4), entropy(keys[head], 4))
    recent = Recent(keys, keys, torch.arange(30, dtype=torch.int32), random(8, HEADS, SIZE, seed=1))
    flat, steep = torch.ones(SIZE), torch.tensor([100.0, *[1.0] * (SIZE - 1)])
    for spectra, larger in (((flat, steep), 0), ((steep, flat), 1)):
        place = Place(0, 1, 30, 12, PLAIN, statistics={"spectrum": torch.stack(spectra)})
        lengths = [len(part) for part in UNComp(eigenvalues=SIZE).compress([], recent, place).segments[0].keys]
        assert lengths[larger] == 2 * lengths[1 - larger]


def test_prefixkv_profiles_the_attention_of_the_tokens_with_the_most_of_it():
    # All keys are equal: the first of T tokens receives 1 + 1/2 + … + 1/T, the last 1/T.
    method, keys = PrefixKV(), torch.ones(1, 512, 4)
    (own,) = method.solve([method.observe(tokens_of(keys, queries=torch.ones(512, 2, 4)))])
    received = (1 / torch.arange(1, 513)).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(own["share"], received.cumsum(0) / 512)
    even, steep = torch.arange(1, 513) / 512, torch.linspace(0.9, 1.0, 512)
    layers = [
        ([], Recent(keys, keys, torch.arange(512, dtype=torch.int32), None, torch.ones(1, 512)),
         Place(layer, 2, 512, 64, PLAIN, shared, statistics={"share": share}))
        for shared in [{}]
        for layer, share in enumerate((even, steep))
    ]  # fmt: skip
    kept = [made.segments[0].tokens for made in method.compress_layers(layers)]
    # 0.9 of the second layer's attention is on one token: all others are the first layer's.
    assert kept == [127, 1]


def test_tidal_decode_chooses_again_where_the_layers_read_most():
    method = TidalDecode(dense=1)
    # Layers 1 to 4; of a layer's attention, the share on what each earlier one chose.
    recovered = torch.tensor(
        [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0.9, 1, 0, 0], [0, 0.2, 0.3, 1, 0], [0, 0.2, 0.3, 0.9, 1]]
    )
    layers = [{"recovered": row.double()} for row in recovered]
    assert [int(own["again"]) for own in method.solve(layers)] == [3] * 5
    place = Place(3, 5, 40, 4, PLAIN, statistics={"again": torch.tensor(3)})
    recent = Recent(random(1, 40, 4), random(1, 40, 4), torch.arange(40, dtype=torch.int32))
    assert method.compress([], recent, place).segments[0].chooses
    assert not replace(method, again=2).compress([], recent, place).segments[0].chooses


def test_what_a_layer_of_tidal_decode_recovers_is_the_attention_on_another_s_choice():
    method, shared = TidalDecode(recent=0, dense=0, read=0.25), {}
    keys = torch.zeros(1, 8, 2)
    keys[0, 1, 0] = keys[0, 2, 1] = 50.0
    found = []
    for layer, queries in enumerate(torch.eye(2)[:, None, None].expand(-1, 8, 1, -1)):
        place = Place(layer, 2, 8, None, PLAIN, shared)
        found.append(method.observe(tokens_of(keys, queries=queries, place=place))["recovered"])
    assert found[0].tolist() == [1, 0]
    # Layer 0 chooses token 1 wherever it is seen, and layer 1 attends to token 2; before it is seen, to all equally.
    assert 0 < found[1][0] < 0.5
    assert found[1][1] == 1
    # The last tokens are read in any case.
    place = Place(1, 2, 8, None, PLAIN, {"tidal_decode": shared["tidal_decode"][:1]})
    given = tokens_of(keys, queries=torch.eye(2)[1].expand(8, 1, -1), place=place)
    assert replace(method, recent=8).observe(given)["recovered"].tolist() == [1, 1]


def test_cskv_restores_what_lies_in_the_calibrated_channels_and_no_projection_loses_less():
    basis = random(5, HEADS * 8)
    calibration, other = (random(64, 5, seed=seed) @ basis for seed in (1, 2))
    calibration, other = (part.unflatten(1, (HEADS, 8)).transpose(0, 1) for part in (calibration, other))
    method = CSKV(key_rank=5 / 16, value_rank=3 / 16)
    (own,) = method.solve([method.observe(tokens_of(calibration))])
    keys, values = method.quantize(other, calibration, None, own)
    torch.testing.assert_close(keys.dense(HEADS), other, rtol=1e-3, atol=1e-3)
    assert keys.codes.shape == (64, 5)
    # The least error of rank 3 is that of the singular values.
    lost = torch.linalg.svdvals(calibration.transpose(0, 1).flatten(1))[3:].square().sum()
    torch.testing.assert_close((values.dense(HEADS) - calibration).square().sum(), lost, rtol=1e-3, atol=1e-3)
    coarse, _ = replace(method, bits=4).quantize(other, other, None, own)
    assert sum(part.nbytes for part in coarse.tensors()) < sum(part.nbytes for part in keys.tensors())
    assert float((coarse.dense(HEADS) - other).square().mean() / other.square().mean()) < 0.01


def test_calibrated_statistics_of_kvquant_serve_the_trained_model_better_than_the_prompt_s():
    folder = resolve("embedded:target")
    text = Path(torch.overrides.__file__).read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    method, calibration = KVQuant(bits=2), ids[2000:3024].view(4, 256)
    statistics = Statistics(method.solve(gather(Architecture(Checkpoint(folder)), [method], calibration, 4, 4)[0]), {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    attach(model)

    def log_probs(method, statistics=None):
        cache = CompressedCache(model, method, None, statistics)
        with torch.no_grad():
            model(ids[None, :300], past_key_values=cache)
            return model(ids[None, 300:364], past_key_values=cache).logits.log_softmax(-1)

    full = log_probs(Full())
    calibrated, prompt = ((full.exp() * (full - log_probs(method, own))).sum() for own in (statistics, None))
    assert calibrated < 0.95 * prompt, (calibrated, prompt)
