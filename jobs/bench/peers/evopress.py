"""The search that EvoPress published, timed: run from a checkout of github.com/IST-DASLab/EvoPress.

Stand-alone, as its Python need have no hasten: it has torch, transformers and tqdm. Three things differ from the
published script: it computes on the CPU instead of a GPU, a missing `datasets` is no error (all data is given
as tokens), and perplexities, which the search only prints, are not taken. What is measured begins when the model is
loaded: logits of the original, then the generations, on one thread.
"""

import os

# Before torch is imported: afterwards the thread pools exist already.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import argparse
import json
import resource
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

# In the published source, and what each becomes here.
_EDITS = {'device = f"cuda"': 'device = "cpu"', 'device_map="auto",': "", "low_cpu_mem_usage=True,": ""}


def cpu_seconds() -> float:
    """CPU seconds, user and system, of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", required=True, help="folder of EvoPress's repository")
    parser.add_argument("--model", required=True, help="folder of a transformers checkpoint")
    parser.add_argument("--database", required=True, help="folder of LAYER/BITS.pth, dequantized weights")
    parser.add_argument("--tokens", required=True, help=".npy of calibration tokens [N, T]")
    parser.add_argument("--bits", required=True, help="average of the codes, scales not counted")
    parser.add_argument("--generations", required=True)
    parser.add_argument("--offspring", required=True)
    parser.add_argument("--survivors", required=True, help="of each selection step, with commas")
    parser.add_argument("--step-tokens", required=True, help="of each selection step, with commas")
    parser.add_argument("--result", required=True, help="JSON file for the measurements")
    return parser.parse_args()


def main() -> None:
    """Search, and write {"cpu_seconds", "wall_seconds", "levels": {layer: bits}}."""
    options = arguments()
    sys.path.insert(0, options.checkout)
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError:
        sys.modules["datasets"] = types.ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    source = Path(options.checkout, "evo_quant_search.py").read_text(encoding="utf-8")
    for published, ours in _EDITS.items():
        if published not in source:
            raise SystemExit(f"{options.checkout} is another version of EvoPress: no {published!r} in its search")
        source = source.replace(published, ours)

    tokens = torch.from_numpy(np.load(options.tokens).astype(np.int64))
    begun: list[tuple[float, float]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loaded(*positional: Any, **named: Any) -> Any:
        model = load(*positional, **named)
        begun.append((time.perf_counter(), cpu_seconds()))
        return model

    AutoModelForCausalLM.from_pretrained = loaded  # type: ignore[method-assign]
    script: dict[str, Any] = {"__name__": "evo_quant_search"}
    exec(compile(source, "evo_quant_search.py", "exec"), script)
    script["compute_perplexity"] = lambda model, data: float("nan")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "tokens.pt"))
        torch.save([row[None] for row in tokens], data)
        sys.argv = [
            "evo_quant_search.py",
            *("--model_name_or_path", options.model, "--dtype", "float32", "--use_fast_tokenizer"),
            *("--calibration_data", data, "--calibration_tokens", str(tokens.numel())),
            *("--calibration_sequence_length", str(tokens.shape[1]), "--eval_sequence_length", str(tokens.shape[1])),
            *("--eval_datasets", data, "--eval_tokens", str(tokens.shape[1])),
            *("--quant_weights_path", options.database, "--target_bitwidth", options.bits),
            *("--generations", options.generations, "--offspring", options.offspring),
            *("--survivors_per_selection", *options.survivors.split(",")),
            *("--tokens_per_selection", *options.step_tokens.split(",")),
        ]
        script["main"]()
    (wall, cpu), ended, ended_cpu = begun[0], time.perf_counter(), cpu_seconds()
    found = Path(options.database, f"evo-kl-configuration-{float(options.bits)}.txt").read_text(encoding="utf-8")
    levels = {name: int(bits) for name, bits in (line.split(": ") for line in found.splitlines())}
    result = {"cpu_seconds": ended_cpu - cpu, "wall_seconds": ended - wall, "levels": levels}
    Path(options.result).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
