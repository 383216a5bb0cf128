import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hasten.jobs.bench.measurements.random_checkpoint import write_random_checkpoint

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)],
)
def test_transformers_loads_it_with_every_tensor_as_written(tmp_path, config):
    parameters = write_random_checkpoint(tmp_path, config, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(each.numel() for each in model.parameters()) == parameters
    written = {}
    for path in tmp_path.glob("*.safetensors"):
        written |= load_file(path)
    state = model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_every_block_has_a_shard_of_its_own(tmp_path):
    write_random_checkpoint(tmp_path, LlamaConfig(**SIZES))
    shards = [set(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    blocks = [{name.split(".")[2] for name in names if ".layers." in name} for names in shards]
    assert sorted(map(sorted, blocks)) == [[], [], [], ["0"], ["1"]]


def test_weights_have_the_usual_deviation(tmp_path):
    write_random_checkpoint(tmp_path, LlamaConfig(**SIZES))
    embedding = next(
        tensors["model.embed_tokens.weight"]
        for tensors in map(load_file, tmp_path.glob("*.safetensors"))
        if "model.embed_tokens.weight" in tensors
    )
    # 2048 draws: the sample's deviation is within 1.6 % of 0.02 two times in three, within 8 % practically always.
    torch.testing.assert_close(embedding.float().std(), torch.tensor(0.02), rtol=0.08, atol=0)
