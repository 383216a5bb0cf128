"""Times the passes of a target with the kernel, with torch.mm and, for a prompt, with transformers, in this process.

`python -m hasten.jobs.bench.processes.passes '{"folder": …, "tokens": […], "prompt": …, "threads": …}'` prints what
`measure` returns as a line of JSON.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hasten.accel.decoding.lengths.timing import clock
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.tree import ROOT
from hasten.kernels.skinny_gemm import c_kernel, choice

CONTEXT = 128
# Rounds of timed passes: at most, at least, and the seconds after which no further one begins.
_REPEATS, _MIN_REPEATS, _MAX_SECONDS = 40, 5, 4.0


@torch.no_grad()
def measure(folder: Path, tokens: Sequence[int], prompt: int) -> dict[str, Any]:
    """seconds: by product (`kernel`, `torch`, `transformers`), and by tokens of a pass or `prompt`.

    instructions: those that torch uses. kernel_chosen: whether hasten uses the kernel on this machine. Outputs are
    compared first. All products alternate, and the fastest pass of each counts, because other load only slows it down.
    """
    chosen = c_kernel.is_available() and choice.is_faster()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    targets = {"kernel": FastTarget.of(model), "torch": FastTarget.of(model, packs=False)}
    now = clock(targets["kernel"])
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    for target in targets.values():
        target.reserve(1, max(CONTEXT + max(tokens), prompt + 1))
    prompts: dict[str, Callable[[], Tensor]] = {
        name: partial(_prompt, target, ids[0].tolist()) for name, target in targets.items()
    }
    prompts["transformers"] = lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0]
    seconds: dict[str, dict[str, float]] = {name: {"prompt": value} for name, value in _fastest(prompts, now).items()}
    for target in targets.values():
        target.clear(0)
        target.prefill(0, [0] * CONTEXT)
    for width in tokens:
        passes = {name: partial(_pass, target, ids[0, :width].tolist()) for name, target in targets.items()}
        for name, value in _fastest(passes, now).items():
            seconds[name][str(width)] = value
    return {
        "seconds": seconds,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernel_chosen": chosen,
    }


def _prompt(target: Target, ids: list[int]) -> Tensor:
    """Logits (1, V) behind a prompt."""
    target.clear(0)
    target.prefill(0, ids[:-1])
    return target.forward([0], [ids[-1:]], [[ROOT]]).logits[0]


def _pass(target: Target, ids: list[int]) -> Tensor:
    """Logits (N, V) of a chain, which is dropped."""
    logits = target.forward([0], [ids], [range(ROOT, len(ids) - 1)]).logits[0]
    target.commit(0, [])
    return logits


def _fastest(functions: Mapping[str, Callable[[], Tensor]], now: Callable[[], float]) -> dict[str, float]:
    """Seconds of the fastest of alternating calls of each function, whose outputs must agree."""
    outputs = [function() for function in functions.values()]
    for output in outputs[1:]:
        # Logits of some tens, after layers whose sums are in other orders.
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-2)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    while True:
        for name, function in functions.items():
            started = now()
            function()
            seconds[name].append(now() - started)
        rounds = len(next(iter(seconds.values())))
        if rounds >= _REPEATS or (rounds >= _MIN_REPEATS and sum(map(sum, seconds.values())) > _MAX_SECONDS):
            return {name: min(values) for name, values in seconds.items()}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    print(json.dumps(measure(Path(arguments.pop("folder")), **arguments)), flush=True)
