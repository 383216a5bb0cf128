import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.assembled import WholeModel, check_division
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_that_is_put_together_computes_what_transformers_computes(tmp_path, family):
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    divided = []
    whole = WholeModel(Checkpoint(tmp_path)).assemble(divided.append)
    assert len(divided) == 2, "every block is given to be divided"
    with torch.no_grad():
        # The experts of a mixture are added in another order.
        torch.testing.assert_close(whole(tiny.tokens()).logits, model(tiny.tokens()).logits, rtol=0, atol=1e-4)


def test_a_size_that_does_not_divide_a_layer_is_refused_with_the_layer_and_the_sizes_that_do(tmp_path):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 132}
    architecture = Architecture(Checkpoint(tiny.save(tmp_path / "model", "llama", **heads)))
    for size in (1, 2, 4):
        check_division(architecture, size, "size")
    refusals = {3: "q_proj .* has 8 heads", 8: "k_proj .* has 4 KV heads"}
    for size, layer in refusals.items():
        with pytest.raises(
            UserError, match=rf"size={size} does not divide model.layers.0.self_attn.{layer}: .* 1, 2, 4;"
        ):
            check_division(architecture, size, "size")


def test_a_fused_layer_of_queries_keys_and_values_is_refused(tmp_path):
    architecture = Architecture(Checkpoint(tiny.save(tmp_path / "model", "phi3")))
    with pytest.raises(UserError, match=r"size=2: model.layers.0.self_attn.qkv_proj .* use mode=zero3"):
        check_division(architecture, 2, "size")
