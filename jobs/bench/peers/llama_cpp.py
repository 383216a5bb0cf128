"""Decoding by llama.cpp, timed: run by the Python of an environment that has llama-cpp-python and gguf.

Stand-alone on purpose: that environment has neither hasten nor torch. It writes the Llama checkpoint as GGUF, with one
type for all matrices of the blocks and one for embedding and output layer, and decodes greedily on one thread.
"""

import os

os.environ.update(OMP_NUM_THREADS="1")

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_cpp import Llama, llama_get_logits_ith

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_CHUNK = 8


def memory_bytes(kind: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{kind}:"))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint in bfloat16, float16 or float32, as float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        size = int(data[:8].view(np.uint64)[0])
        header = json.loads(bytes(data[8 : 8 + size]))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            raw = np.array(data[first:last])
            if entry["dtype"] == "BF16":  # numpy has no such type: it is the upper half of a float32
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F16": np.float16, "F32": np.float32}[entry["dtype"]]).astype(np.float32)
            found[name] = values.reshape(entry["shape"])
    return found


def write(folder: Path, path: Path, kind: Any, outer: Any) -> None:
    """The checkpoint as GGUF. kind, outer: types of matrices in the blocks, and of embedding and output layer."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    # Prompts are given as ids, so that only the number of tokens matters.
    names = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    names |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([names.get(number, f"<unused{number}>") for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    merges = tokenizer["model"].get("merges", [])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])

    def add(name: str, values: np.ndarray, stored: Any) -> None:
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    def interleaved(values: np.ndarray, count: int) -> np.ndarray:
        # llama.cpp rotates adjacent rows, transformers those of the two halves of a head.
        return values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)

    weights = tensors(folder)
    add("token_embd.weight", weights["model.embed_tokens.weight"], outer)
    add("output_norm.weight", weights["model.norm.weight"], None)
    if "lm_head.weight" in weights and not config.get("tie_word_embeddings"):
        add("output.weight", weights["lm_head.weight"], outer)
    for block in range(config["num_hidden_layers"]):
        for name, other in _NAMES.items():
            values = weights[f"model.layers.{block}.{name}.weight"]
            if other in ("attn_q", "attn_k"):
                values = interleaved(values, heads if other == "attn_q" else kv_heads)
            add(f"blk.{block}.{other}.weight", values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_seconds(model: Llama, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Least mean seconds of a token over some tokens in succession, and the greedy tokens."""
    model.reset()
    model.eval(prompt[:-1])
    token, tokens, seconds = prompt[-1], [], []
    for _ in range(count):
        started = time.thread_time()
        model.eval([token])
        seconds.append(time.thread_time() - started)
        logits = np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        token = int(logits.argmax())
        tokens.append(token)
    return min(sum(seconds[at : at + _CHUNK]) / _CHUNK for at in range(0, count, _CHUNK)), tokens


def prompt_seconds(model: Llama, length: int) -> float:
    """Seconds of a prompt of this length."""
    model.reset()
    started = time.thread_time()
    model.eval([number % model.n_vocab() for number in range(100, 100 + length)])
    return time.thread_time() - started


def main() -> None:
    """Write the GGUF if it is missing, time it, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--kind", default="Q4_0")
    parser.add_argument("--outer", default="Q8_0")
    parser.add_argument("--prompt", type=json.loads, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    if not given.gguf.exists():
        types = gguf.GGMLQuantizationType
        write(given.model, given.gguf, types[given.kind], types[given.outer])
    before = memory_bytes("VmRSS")
    context = max(len(given.prompt) + given.tokens, given.length) + 8
    model = Llama(
        str(given.gguf), n_ctx=context, n_threads=1, n_threads_batch=1, n_batch=512, n_ubatch=512, verbose=False
    )
    times = [token_seconds(model, given.prompt, given.tokens) for _ in range(given.repeats)]
    memory = memory_bytes("VmHWM") - before
    prompts = [prompt_seconds(model, given.length) for _ in range(given.repeats)]
    result = {
        "token_seconds": min(seconds for seconds, _ in times),
        "tokens": times[0][1],
        "prompt_seconds": min(prompts),
        "memory_bytes": memory,
        "version": version("llama-cpp-python"),
    }
    given.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
