"""GGUF files: written from checkpoints of every family that llama.cpp has here, and read back as checkpoints."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.outputs.gguf import FILE, GgufFolder, GgufOptions
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.models.ggml.types import TYPES
from hasten.accel.models.gguf.families import FAMILIES
from hasten.accel.models.gguf.tokenizer import splitter_of
from tests.models import tiny

_LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
_WINDOWS = ["sliding_attention"] * 5 + ["full_attention"]
CASES = {
    "llama": ("llama", {"attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": _LLAMA_3}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": _WINDOWS, "num_hidden_layers": 6, "final_logit_softcapping": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"decoder_sparse_step": 1}),
}
# Python of an environment with llama-cpp-python, whose perplexity must be that of the file as it is read here.
PEER = os.environ.get("HASTEN_LLAMA_CPP_PYTHON", "")


def write(source, path, level, options=None, ignore=()):
    """A GGUF file of a checkpoint, rounded to nearest in this process."""
    checkpoint = Checkpoint(source)
    architecture, method = Architecture(checkpoint), RoundToNearest()
    groups = make_layer_groups(architecture, parse_level(level), ignore, 0, 0)
    folder = GgufFolder(path, architecture, groups, options or GgufOptions("f32", "f32"))
    folder.open({}, overwrite=False)
    for block, members in enumerate(groups):
        packed = {
            layer.name: group.level.pack(
                group.level.make(method, checkpoint.tensor(f"{layer.name}.weight"), None).weight
            )
            for group in members
            for layer in group.layers
        }
        folder.write_block(block, packed, [])
    folder.finish()
    folder.release()
    return folder


def logits(folder):
    model = Architecture(Checkpoint(folder))
    with torch.no_grad():
        hidden = model.embed(tiny.tokens())
        for block in range(model.num_blocks):
            hidden = model.run_block(model.load_block(block), block, hidden)
        return model.head(hidden)


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_back_as_the_model_that_was_written(case, tmp_path):
    family, changes = CASES[case]
    source = tiny.save(tmp_path / "source", family, **changes)
    write(source, tmp_path / "out", "q8_0")
    original, read = Checkpoint(source), Checkpoint(resolve(str(tmp_path / "out" / FILE)))
    assert [name for name in read.names if name not in original] == []
    for name in read.names:
        values, stored = original.tensor(name).float(), read.tensor(name).float()
        assert stored.shape == values.shape
        # Blocks of 32 weights with a code of 8 bits, and all other tensors in float32.
        limit = 0.005 * values.abs().max() if read.is_quantized(name) else 1e-6
        assert (stored - values).abs().max() <= limit, name
    # The config from the metadata computes what the folder's own config computes.
    torch.testing.assert_close(logits(read.path), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(logits(source).flatten(), logits(read.path).flatten(), dim=0) > 0.99
    if PEER:
        assert_llama_cpp_computes_the_same(tmp_path, tmp_path / "out")


def assert_llama_cpp_computes_the_same(work, folder):
    tokens, result = work / "tokens.json", work / "result.json"
    tokens.write_text(json.dumps(tiny.tokens().tolist()))
    script = Path(__file__).parents[2] / "jobs" / "bench" / "peers" / "llama_cpp_perplexity.py"
    words = [script, "--gguf", folder / FILE, "--tokens", tokens, "--result", result]
    # -P: the folder of the script has a module of the package's name.
    subprocess.run([PEER, "-P", *map(str, words)], check=True, capture_output=True, env={})
    probabilities = logits(folder)[:, :-1].log_softmax(-1).gather(-1, tiny.tokens()[:, 1:, None])
    assert json.loads(result.read_text())["perplexity"] == pytest.approx(float((-probabilities).mean().exp()), rel=0.01)


def test_every_family_with_names_is_written_here():
    assert {CASES[case][0] for case in CASES} == set(FAMILIES)


def test_types_and_metadata_are_what_llama_cpp_reads(tmp_path):
    source = tiny.save(tmp_path / "source", "llama", hidden_size=256, head_dim=64, tie_word_embeddings=True)
    folder = write(source, tmp_path / "out", "q4_k", GgufOptions("q6_k"), ignore=["v_proj"])
    reader = GGUFReader(tmp_path / "out" / FILE)
    kinds = {tensor.name: GGMLQuantizationType(tensor.tensor_type).name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in kinds
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_up.weight"] == "Q4_K"
    # 128 columns, a layer that is left as it is, and a norm.
    assert [kinds[f"blk.0.{name}.weight"] for name in ("ffn_down", "attn_v", "attn_norm")] == ["Q5_0", "F32", "F32"]
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["llama.block_count"] == 2
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert values["llama.attention.key_length"] == values["llama.rope.dimension_count"] == 64
    assert values["llama.rope.freq_base"] == 10000.0
    assert values["llama.vocab_size"] == tiny.VOCABULARY
    assert sum(folder.type_bytes().values()) == sum(int(tensor.n_bytes) for tensor in reader.tensors)


def test_queries_and_keys_are_in_the_order_that_rotates_neighbours(tmp_path):
    source = tiny.save(tmp_path / "source", "llama")
    write(source, tmp_path / "out", "q8_0", ignore=["self_attn"])
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out" / FILE).tensors}
    queries = Checkpoint(source).tensor("model.layers.0.self_attn.q_proj.weight")
    # A head has 16 rows, and transformers rotates row 1 with row 9.
    assert np.array_equal(stored["blk.0.attn_q.weight"][2:4], queries[[1, 9]].numpy())
    values = Checkpoint(source).tensor("model.layers.0.self_attn.v_proj.weight")
    assert np.array_equal(stored["blk.0.attn_v.weight"], values.numpy())


def test_the_tokenizer_is_read_back_with_the_same_ids(tmp_path):
    write(embedded.path("target"), tmp_path / "out", "q8_0", GgufOptions("q8_0"))
    folder = resolve(str(tmp_path / "out" / FILE))
    original, read = (AutoTokenizer.from_pretrained(path) for path in (embedded.path("target"), folder))
    text = "def f(x):\n\treturn x ** 12345  # naïve 漢字 don't"
    assert read(text)["input_ids"] == original(text)["input_ids"]
    assert (read.bos_token_id, read.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    values = {name: field.contents() for name, field in GGUFReader(tmp_path / "out" / FILE).fields.items()}
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(values["tokenizer.ggml.tokens"]) == 4096


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()], None),
    ],
)
def test_the_name_of_a_splitter_is_found_in_its_steps(steps, name, tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    if name is None:
        with pytest.raises(UserError, match=r"give its name as gguf\.pre_tokenizer"):
            splitter_of(tmp_path)
    else:
        assert splitter_of(tmp_path) == name


def test_a_file_that_changes_is_read_anew(tmp_path):
    source = tiny.save(tmp_path / "source", "llama")
    write(source, tmp_path / "one", "q8_0")
    write(source, tmp_path / "two", "q4_0")
    file = tmp_path / "one" / FILE
    folder = resolve(str(file))
    assert resolve(str(file)) == folder
    first = Checkpoint(folder).fingerprint()
    (tmp_path / "two" / FILE).replace(file)
    assert Checkpoint(resolve(str(file))).fingerprint() != first


def test_what_llama_cpp_does_not_have_is_refused_with_the_reason(tmp_path):
    groups = [[], []]
    for family, changes, reason in (
        ("opt", {}, r"cannot write model_type='opt': there are names and metadata for llama"),
        ("qwen3_moe", {"norm_topk_prob": False}, "cannot write norm_topk_prob=False of model_type=qwen3_moe"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "cannot write query_pre_attn_scalar=64: expected 32, head_dim"),
    ):
        model = Architecture(Checkpoint(tiny.save(tmp_path / family, family, **changes)))
        with pytest.raises(UserError, match=reason):
            GgufFolder(tmp_path / "out", model, groups, GgufOptions())
    llama = Architecture(Checkpoint(tiny.save(tmp_path / "llama", "llama")))
    groups = make_layer_groups(llama, parse_level("w4g32"), (), 0, 0)
    with pytest.raises(UserError, match=f"at level w4g32: expected one of {', '.join(TYPES)}"):
        GgufFolder(tmp_path / "out", llama, groups, GgufOptions())
    with pytest.raises(UserError, match=r"gguf\.output_type=q9 is no type: expected one of q2_k"):
        GgufOptions("q9")


def test_damaged_files_are_named(tmp_path):
    write(tiny.save(tmp_path / "source", "llama"), tmp_path / "out", "q8_0")
    whole = (tmp_path / "out" / FILE).read_bytes()
    for name, data, reason in (
        ("text.gguf", b"not one", "is not a GGUF file"),
        ("short.gguf", whole[:200], "is truncated or damaged"),
        ("cut.gguf", whole[:-4096], "is truncated: tensor"),
        ("old.gguf", b"GGUF\x01\0\0\0" + whole[8:], "is GGUF version 1"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} {reason}"):
            resolve(str(tmp_path / name))
        assert not list(tmp_path.glob(f".{name}*"))
