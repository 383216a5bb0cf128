"""The damping that is chosen by the tokens that a factor is not made of."""

from functools import cache

import pytest
import torch
import transformers

from hasten.accel.compression.calibration.factor import DAMPING, choose_damping, factorise
from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.data.tokens import load_tokens
from hasten.accel.models import embedded
from tests.compression.trained import target_model

LAYER = "mlp.down_proj"


@cache
def down_projection(split, sequences):
    """Hessian of the widest layer of the first block, in halves, on real text of 256 tokens a sequence."""
    model = target_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path("target"))
    tokens = load_tokens("library", tokenizer, sequences, 256, split=split)
    groups = [group for group in make_layer_groups(model, parse_level("w8"), (), 0, 0)[0] if LAYER in group.key]
    chunks = dict(enumerate(tokens.tensor_split(2)))
    (tree,) = Shard(model, chunks, batch=8, cut=1).collect(model.load_block(0), groups).values()
    return tree.total()


def error_on_other_text(damping):
    model = target_model()
    weight = model.checkpoint.tensor(f"model.layers.0.{LAYER}.weight")
    quantizer = GPTQ(damping=damping)
    found = quantizer.quantize(
        weight, quantizer.prepare(down_projection("train", 8)), Scheme(3, 64)
    ).weight.dequantize()
    return float(down_projection("held_out", 32).power(weight.float() - found.float()).sum())


def test_with_few_tokens_the_chosen_damping_is_as_good_on_other_text_as_the_best():
    # Twice as many tokens as columns.
    errors = {damping: error_on_other_text(damping) for damping in (0.01, 0.03, 0.1, 0.3, 1.0)}
    chosen = error_on_other_text(None)
    assert chosen < 0.8 * errors[0.01]
    assert chosen <= 1.03 * min(errors.values())


def test_where_tokens_are_many_or_halves_unknown_it_is_one_percent():
    order = torch.arange(4)
    first, second = (Hessian(4) for _ in range(2))
    for half, seed in ((first, 0), (second, 1)):
        half.add(torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)))
    assert choose_damping(first, 1.0, order) == DAMPING
    assert choose_damping(Hessian.of_halves(first, second), 1.0, order) == DAMPING
    assert choose_damping(Hessian.of_halves(first, second), 0.001, order) == 0.001


def test_independent_columns_need_no_compensation_and_related_ones_do():
    generator = torch.Generator().manual_seed(0)
    noise, shared = (torch.randn(2, 48, count, generator=generator) for count in (32, 1))
    chosen = {}
    for name, x in {"independent": noise, "related": shared + 0.05 * noise}.items():
        halves = [Hessian(32) for _ in range(2)]
        for half, rows in zip(halves, x, strict=True):
            half.add(rows)
        chosen[name] = choose_damping(Hessian.of_halves(*halves), 1.0, torch.arange(32))
    # Of independent inputs all correlation that is seen is chance.
    assert chosen["independent"] == 1.0
    assert chosen["related"] <= 0.1


def test_damping_that_is_chosen_is_bounded_and_leaves_a_factor():
    hessian = down_projection("train", 8)
    assert choose_damping(hessian, 1.0, torch.arange(hessian.columns)) > 0.02
    factor = factorise(hessian, None, 0.02, "static", "rounded to nearest")
    assert factor.damping == pytest.approx(DAMPING * float(hessian.diagonal().mean()))
    assert factor.notes == ()
