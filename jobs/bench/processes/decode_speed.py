"""Times the fast path's greedy decoding of one checkpoint in this process, and measures the memory that it takes.

`python -m hasten.jobs.bench.processes.decode_speed '{"folder": …, "prompt": […], "tokens": …, "length": …,
"repeats": …}'` prints what `measure` returns as a line of JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import thread_time

import psutil
import torch

# Imported before memory is measured, because loading a checkpoint imports them.
import transformers.models.llama.modeling_llama  # noqa: F401

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.tree import ROOT
from hasten.cluster.runtime.resources import peak_rss_bytes

# The fastest mean over this many tokens in succession counts, because other load only slows decoding down.
_CHUNK = 8


def measure(folder: Path, prompt: Sequence[int], tokens: int, length: int, repeats: int) -> dict[str, object]:
    """Seconds of a token and of a prompt, memory, and the tokens, each the least of `repeats`.

    token_seconds: of a greedy token after `prompt`. prompt_seconds: of a prompt of `length`. memory_bytes: the largest
    resident set of decoding, above the one before the checkpoint is loaded. tokens: what was decoded.
    """
    before = psutil.Process().memory_info().rss
    target = load_target(folder, torch.float32)
    times = [_token_seconds(target, prompt, tokens, length) for _ in range(repeats)]
    memory = peak_rss_bytes() - before
    return {
        "token_seconds": min(seconds for seconds, _ in times),
        "tokens": times[0][1],
        "prompt_seconds": min(_prompt_seconds(target, length) for _ in range(repeats)),
        "memory_bytes": memory,
    }


def _token_seconds(target: Target, prompt: Sequence[int], count: int, length: int) -> tuple[float, list[int]]:
    """Least mean seconds of a token, and the greedy tokens."""
    target.reserve(1, max(len(prompt) + count, length) + 8)
    target.prefill(0, prompt[:-1])
    token, tokens, seconds = prompt[-1], [], []
    for _ in range(count):
        started = thread_time()
        token_logits = target.forward([0], [[token]], [[ROOT]]).logits[0, 0]
        target.commit(0, [0])
        seconds.append(thread_time() - started)
        token = int(token_logits.argmax())
        tokens.append(token)
    return min(sum(seconds[at : at + _CHUNK]) / _CHUNK for at in range(0, count, _CHUNK)), tokens


def _prompt_seconds(target: Target, length: int) -> float:
    target.clear(0)
    started = thread_time()
    target.prefill(0, [number % target.vocabulary for number in range(100, 100 + length)])
    return thread_time() - started


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(arguments.pop("folder")), **arguments)), flush=True)
