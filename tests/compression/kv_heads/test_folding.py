"""Joined KV heads: what is exact, what is lost least, and what loaders find."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.cache.calibration import gather
from hasten.accel.compression.kv_heads.checkpoint import KVHeadsFolder, check
from hasten.accel.compression.kv_heads.folding import KVHeads, folded
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

TOKENS = tiny.tokens(4, 24)
SIZE, HALF = 16, 8


def joined(source, output, **changes):
    """Logits of the original and of its checkpoint with joined heads."""
    architecture, method = Architecture(Checkpoint(source)), KVHeads(**changes)
    folder = KVHeadsFolder(output, architecture, method)
    folder.open({}, overwrite=False)
    (sums,) = gather(architecture, [method], TOKENS, len(TOKENS), 2)
    for block, own in enumerate(method.solve(sums)):
        folder.write_folded(block, own)
    folder.finish()
    folder.release()
    with torch.no_grad():
        return [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits for path in (source, output)
        ]


def turned(weight, numbers):
    """Rows of a head with every plane turned and stretched."""
    rows = numbers.reshape(HALF, *[1] * (weight.ndim - 1)) * torch.complex(weight[:HALF], weight[HALF:])
    return torch.cat([rows.real, rows.imag])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_heads_whose_keys_are_turned_copies_and_whose_values_share_directions_are_joined_without_loss(tmp_path, family):
    model, generator = tiny.build(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            lengths, angles = torch.rand(2, HALF, generator=generator)
            numbers = torch.polar(lengths + 0.5, angles * 6)
            for name, other in (("k_proj", turned), ("v_proj", lambda part, _: 2.0 * part.flip(0))):
                projection = getattr(layer.self_attn, name)
                for part in filter(lambda part: part is not None, (projection.weight, projection.bias)):
                    part[SIZE:] = other(part[:SIZE], numbers)
    model.save_pretrained(tmp_path / "m")
    original, found = joined(tmp_path / "m", tmp_path / "out")
    torch.testing.assert_close(found, original, rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 1
    # The mean of the heads loses what the angles between them say.
    _, mean = joined(tmp_path / "m", tmp_path / "mean", keys="mean")
    assert float((mean - original).square().mean()) > 100 * float((found - original).square().mean())


def test_values_keep_the_directions_of_least_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 2 * SIZE, generator=generator).double() @ torch.randn(2 * SIZE, 2 * SIZE).double()
    zeros = torch.zeros(1, HALF, 2, 2)
    sums = {"values": (values.T @ values)[None], "real": zeros, "imaginary": zeros}
    (own,) = KVHeads().solve([sums])
    lost = (values - values @ own["v"][0].T @ own["v"][0]).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(values)[SIZE:].square().sum())


def test_query_heads_stay_with_their_kv_head():
    # Two groups of two KV heads of two numbers, each with two query heads; keys of the odd heads are turned by i.
    one, turn = torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    matrices = torch.stack([torch.stack([one, turn])] * 2).double()
    values = torch.eye(4)[:2].expand(2, -1, -1).double()
    query = torch.arange(1.0, 17.0)
    found = folded({"q": query, "k": torch.arange(8.0)}, {"q": matrices, "k": matrices, "v": values})
    assert found["q"].tolist() == [1, 2, 3, 4, 6, -5, 8, -7, 9, 10, 11, 12, 14, -13, 16, -15]
    assert found["k"].tolist() == [0 + 3, 1 - 2, 4 + 7, 5 - 6]


@pytest.mark.parametrize(
    ("family", "changes", "wrong"),
    [
        ("llama", {"group": 4}, "group=4 does not divide the 2 KV heads of LlamaForCausalLM"),
        ("qwen3", {}, "Qwen3ForCausalLM has other parts between its projections and its heads"),
        ("opt", {}, "OPTForCausalLM has other parts between its projections and its heads"),
    ],
)
def test_models_whose_heads_cannot_be_joined_are_refused(tmp_path, family, changes, wrong):
    source = tiny.save(tmp_path / "m", family)
    with pytest.raises(UserError, match=wrong):
        check(Architecture(Checkpoint(source)), KVHeads(**changes))


def test_a_model_must_say_how_many_kv_heads_it_has(tmp_path):
    architecture = Architecture(Checkpoint(tiny.save(tmp_path / "m", "llama")))
    vars(architecture.config)["num_key_value_heads"] = None
    with pytest.raises(UserError, match="LlamaForCausalLM has no num_key_value_heads at the top of its config"):
        check(architecture, KVHeads())


def test_wrong_fields_are_named():
    with pytest.raises(UserError, match="group=1 is out of range: 2 or more"):
        KVHeads(1)
    with pytest.raises(UserError, match="keys=sum is none of directions, mean"):
        KVHeads(2, "sum")
