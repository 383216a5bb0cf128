"""Recipes of llm-compressor, timed: run by the Python of an environment that has llm-compressor 0.14.

Stand-alone on purpose: that environment has neither hasten nor hasten's versions of transformers and
compressed-tensors. What is measured is `oneshot` alone, with llm-compressor's own defaults for act-order (static),
dampening, block size and batch size, on one thread; imports, loading and saving are given separately.
Departs from the defaults in one thing: the calibration windows are not shuffled (its shuffle has no seed), unless
--shuffle asks for it.
"""

import os

# Before torch is imported: afterwards the thread pools exist already.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import argparse
import json
import resource
import time
from importlib.metadata import version
from typing import Any

# Presets of the schemes that have a recipe; w4a16 is given by bits and groups.
SCHEMES = {"w4a16": "", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def cpu_seconds() -> float:
    """CPU seconds, user and system, of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_bytes() -> int:
    """Largest resident set of this process, in bytes.

    Not ru_maxrss: it survives exec on Linux, so it would start from the size of whoever started this script.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a transformers checkpoint")
    parser.add_argument("--tokens", required=True, help=".npy of calibration tokens [N, T]")
    parser.add_argument("--recipe", choices=("gptq", *SCHEMES), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--output", required=True, help="folder for the compressed checkpoint")
    parser.add_argument("--result", required=True, help="JSON file for the measurements")
    parser.add_argument("--dtype", default="auto", help="dtype the model is loaded and calibrated in")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the windows, as llm-compressor does by itself")
    return parser.parse_args()


def recipe(options: argparse.Namespace) -> list[Any]:
    """Modifiers of a recipe; those of schemes are those of llm-compressor's own examples."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.symmetric,
        "strategy": "group",
        "group_size": options.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if options.recipe == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if options.recipe == "w4a16":
        import torch
        from llmcompressor.modifiers.transform.awq import AWQModifier

        if not torch.cuda.is_available():
            # It pins the memory of its cache, which torch refuses without an accelerator.
            torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign, assignment, return-value]
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    scheme = {"targets": "Linear", "scheme": SCHEMES[options.recipe], "ignore": ["lm_head"]}
    if options.recipe == "w8a8":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**scheme)]
    return [QuantizationModifier(**scheme)]


def main() -> None:
    """Load, compress, save, and write {"cpu_seconds", "wall_seconds", "peak_rss_bytes", "version", …}."""
    options = arguments()
    started, started_cpu = time.perf_counter(), cpu_seconds()

    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    imported, imported_cpu = time.perf_counter(), cpu_seconds()

    tokens = np.load(options.tokens).astype(np.int64)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    modifiers = recipe(options)
    loaded, loaded_cpu, loaded_peak = time.perf_counter(), cpu_seconds(), peak_rss_bytes()

    oneshot(
        model=model,
        dataset=data,
        recipe=modifiers,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=options.shuffle,
    )
    ended, ended_cpu, peak = time.perf_counter(), cpu_seconds(), peak_rss_bytes()

    model.save_pretrained(options.output, save_compressed=True)
    result = {
        "cpu_seconds": ended_cpu - loaded_cpu,
        "wall_seconds": ended - loaded,
        "peak_rss_bytes": peak,
        "version": version("llmcompressor"),
        "import_cpu_seconds": imported_cpu - started_cpu,
        "import_seconds": imported - started,
        "load_cpu_seconds": loaded_cpu - imported_cpu,
        "load_seconds": loaded - imported,
        "load_peak_rss_bytes": loaded_peak,
        "save_cpu_seconds": cpu_seconds() - ended_cpu,
        "save_seconds": time.perf_counter() - ended,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_version": torch.__version__,
        "tokens": int(tokens.size),
    }
    with open(options.result, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
