"""Milliseconds of a target's passes with the kernel for few rows, against torch.mm, by kind of processor.

Kinds of processor are simulated on this one by switching instructions off, for the compiler and for torch.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.common.markdown import table
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "passes: the product of few rows against torch.mm"
# Environment of a process that uses no more than these instructions. A later -march=native does not switch them on.
_ENVIRONMENT: Mapping[str, Mapping[str, str]] = {
    "native": {},
    "avx2": {
        "CC": "-mno-avx512f",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
_PRODUCTS = {"kernel": "hasten", "torch": "hasten with torch.mm", "transformers": "transformers"}


@dataclass
class Config(Run):
    """Time passes of a target in float32, with weights that are exact in bfloat16, in a process for each kind."""

    target: str = option("embedded:target", f"the target, of Llama's kind: {MODEL}")
    tokens: list[int] = option([1, 8, 9, 16, 17, 64], "tokens of a pass, each a column")
    prompt: int = option(512, "tokens of the prompt in the last column", at_least=2)
    instructions: list[str] = option(
        ["native", "avx2"], f"kinds of processor: {', '.join(_ENVIRONMENT)}; native is this one"
    )
    threads: int = option(1, "threads", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # transformers: `hasten bench passes --help` must not wait for it.
    from transformers import AutoConfig

    from hasten.accel.decoding.targets.families import refusal
    from hasten.accel.models.checkpoint import resolve

    unknown = next((name for name in config.instructions if name not in _ENVIRONMENT), None)
    if unknown is not None:
        raise UserError(f"instructions={unknown} is none of {', '.join(_ENVIRONMENT)}")
    if min(config.tokens, default=0) < 1 or max(config.tokens) > config.prompt:
        raise UserError(f"tokens={config.tokens} is wrong: expected numbers from 1 to prompt={config.prompt}")
    model = resolve(config.target)
    reason = refusal(AutoConfig.from_pretrained(model))
    if reason is not None:
        raise UserError(f"target={config.target} cannot be measured: {reason}")
    folder = start(config)
    with tracked(config, "bench passes", folder) as tracker:
        tracker.params(plain(config))
        results = {name: _measured(config, model, name) for name in config.instructions}
        publish(config.document, folder, HEADING, _section(config, results))
        report = {
            "job": "bench passes",
            "config": plain(config),
            "metrics": _metrics(results),
            "passes": results,
            "output": str(folder),
        }
        return tracker.report(report)


def _measured(config: Config, model: Path, instructions: str) -> dict[str, Any]:
    """What a process with these instructions measured; see processes/passes.py."""
    changed = dict(_ENVIRONMENT[instructions])
    if "CC" in changed:
        changed["CC"] = f"{os.environ.get('CC') or 'cc'} {changed['CC']}"
    arguments = {
        "folder": str(model),
        "tokens": list(config.tokens),
        "prompt": config.prompt,
        "threads": config.threads,
    }
    _LOG.info("measuring with instructions=%s", instructions)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hasten.jobs.bench.processes.passes", json.dumps(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(config.threads), **changed},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process for instructions={instructions} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Speed over torch.mm by kind of processor and tokens, and over transformers for the prompt."""
    metrics = {}
    for name, result in results.items():
        seconds = result["seconds"]
        for width, value in seconds["kernel"].items():
            metrics[f"{name}_{width}_over_torch"] = seconds["torch"][width] / value
        metrics[f"{name}_prompt_over_transformers"] = seconds["transformers"]["prompt"] / seconds["kernel"]["prompt"]
    return metrics


def _section(config: Config, results: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [*map(str, config.tokens), "prompt"]
    rows = [
        [result["instructions"], _PRODUCTS[product], *_cells(seconds, columns)]
        for result in results.values()
        for product, seconds in result["seconds"].items()
    ]
    notes = [
        f"On {result['instructions']} hasten uses torch's products: torch was the faster one when both were timed, or "
        "there is no C compiler."
        for result in results.values()
        if not result["kernel_chosen"]
    ]
    text = [
        f"`hasten bench passes target={config.target}`: milliseconds of a pass by its tokens, 128 tokens in the cache, "
        f"float32, threads={config.threads}; and of a prompt of {config.prompt} tokens to its last logits. Of "
        "alternating passes the fastest counts, by CPU time with one thread. Processors other than this one are "
        "simulated by switching instructions off, for the compiler and for torch.",
        provenance(),
        table(["instructions", "products", *columns[:-1], f"prompt of {config.prompt}"], rows),
        *notes,
    ]
    return "\n\n".join(text)


def _cells(seconds: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{1e3 * seconds[column]:.1f}" if column in seconds else "" for column in columns]
