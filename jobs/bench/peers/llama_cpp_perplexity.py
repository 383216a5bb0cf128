"""Perplexity by llama.cpp of given tokens: run by the Python of an environment that has llama-cpp-python.

Stand-alone on purpose: that environment has neither hasten nor torch. It also reports the tokens of a text, so that
the tokenizer in the file can be held against the original's.
"""

import os

os.environ.update(OMP_NUM_THREADS="1")

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def loss(model: Llama, tokens: list[int]) -> float:
    """Sum of the negative log probabilities of all tokens but the first, in nats."""
    model.reset()
    model.eval(tokens)
    logits = np.asarray(model.scores[: len(tokens) - 1], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).sum())


def main() -> None:
    """Read the windows, run them, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: list of windows of token ids")
    parser.add_argument("--text", default="", help="text to tokenize")
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    windows = json.loads(given.tokens.read_text())
    length = max(map(len, windows))
    model = Llama(
        str(given.gguf), n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    count = sum(len(window) - 1 for window in windows)
    result = {
        "perplexity": float(np.exp(sum(loss(model, window) for window in windows) / count)),
        "tokens": count,
        "text_tokens": model.tokenize(given.text.encode(), add_bos=False, special=False) if given.text else None,
        "version": version("llama-cpp-python"),
    }
    given.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
