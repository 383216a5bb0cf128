"""Milliseconds of a token and memory of decoding from packed weights, against the original and llama.cpp.

llama.cpp is run where `peer_python` names the Python of an environment with llama-cpp-python and gguf.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.jobs.bench._document import provenance, publish
from hasten.jobs.bench.processes.runs import DecodeSpeed, check_peer, hasten_compress, peer_decode
from hasten.jobs.common.markdown import table
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import MODEL, Run, option, plain

_LOG = logging.getLogger(__name__)
HEADING = "packed: decoding from quantized weights"
_ORIGINAL = "hasten, original"
_PEER = "llama-cpp-python"
_PROMPT = [1, 504, 388, 22, 771, 906]


@dataclass
class Config(Run):
    """Decode greedily at batch 1 on one thread, each checkpoint in processes of its own that alternate."""

    target: str = option("embedded:target", f"the target, of Llama's kind: {MODEL}")
    bits: list[int] = option([4], "bits of the layers, rounded to nearest")
    head_bits: list[int] = option([0, 8, 4], "bits of embedding and output layer; 0 leaves them as they are")
    group_size: int = option(64, "columns that share a scale", at_least=-1)
    tokens: int = option(32, "tokens that are decoded", at_least=8)
    length: int = option(512, "tokens of the prompt that is timed", at_least=1)
    rounds: int = option(3, "processes of every row; the fastest counts", at_least=1)
    peer_python: str | None = option(None, "Python of an environment with llama-cpp-python; null leaves its rows out")
    peer_types: list[str] = option(["Q4_0/Q8_0", "Q4_0/Q4_0"], "the peer's types: of layers / of the embedding")
    threads: int = option(1, "threads; more than one are not supported", at_least=1, at_most=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the table is printed and written to the document."""
    # transformers: `hasten bench packed --help` must not wait for it.
    from hasten.accel.models.checkpoint import Checkpoint, resolve

    model = resolve(config.target).absolute()
    wrong = next((kind for kind in config.peer_types if kind.count("/") != 1), None)
    if wrong is not None:
        raise UserError(f"peer_types={wrong} is wrong: expected TYPE/TYPE, such as Q4_0/Q8_0")
    if config.peer_python is not None:
        check_peer(config.peer_python, _PEER)
    folder = start(config)
    with tracked(config, "bench packed", folder) as tracker:
        tracker.params(plain(config))
        tied = Checkpoint(model).config.get("tie_word_embeddings", False)
        processes = {_ORIGINAL: partial(_decode, config, model)}
        for bits in config.bits:
            for head in config.head_bits:
                name = f"hasten, {bits} bits, " + (f"embedding {head} bits" if head else "embedding as it is")
                made = _compressed(config, model, bits, head, bool(tied), folder / f"w{bits}-{head}")
                processes[name] = partial(_decode, config, made)
        for kind in config.peer_types if config.peer_python is not None else ():
            processes[f"llama.cpp, {kind}"] = partial(_peer, config, model, kind, folder / kind.replace("/", "-"))
        results = _alternating(processes, config.rounds)
        publish(config.document, folder, HEADING, _section(config, results))
        report = {
            "job": "bench packed",
            "config": plain(config),
            "metrics": _metrics(results),
            "rows": results,
            "output": str(folder),
        }
        return tracker.report(report)


def _compressed(config: Config, model: Path, bits: int, head: int, tied: bool, folder: Path) -> Path:
    """The model's checkpoint at these bits."""
    options: dict[str, object] = {
        "model": model,
        "quantizer": "round_to_nearest",
        "bits": bits,
        "group_size": config.group_size,
        "symmetric": "true",
        "workers": 1,
    }
    if head:
        options |= {"head_bits": head} if tied else {"head_bits": head, "embedding_bits": head}
    return hasten_compress(folder, options).folder


def _decode(config: Config, folder: Path) -> DecodeSpeed:
    arguments = {
        "folder": str(folder),
        "prompt": _PROMPT,
        "tokens": config.tokens,
        "length": config.length,
        "repeats": 2,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hasten.jobs.bench.processes.decode_speed", json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"decoding {folder} failed:\n{done.stderr[-2000:]}")
    speed: DecodeSpeed = json.loads(done.stdout.splitlines()[-1])
    return speed


def _peer(config: Config, model: Path, kind: str, folder: Path) -> DecodeSpeed:
    assert config.peer_python is not None
    layers, outer = kind.split("/")
    options = {
        "model": model,
        "gguf": folder / "model.gguf",
        "kind": layers,
        "outer": outer,
        "prompt": json.dumps(_PROMPT),
        "tokens": config.tokens,
        "length": config.length,
        "repeats": 2,
    }
    return peer_decode(config.peer_python, folder, options)


def _alternating(processes: Mapping[str, Callable[[], DecodeSpeed]], rounds: int) -> dict[str, DecodeSpeed]:
    """The least of every measure over the rounds, by row; tokens must not change."""
    results: dict[str, DecodeSpeed] = {}
    with Progress("bench packed", rounds * len(processes), "run") as progress:
        for done in range(rounds * len(processes)):
            name = list(processes)[done % len(processes)]
            speed = processes[name]()
            best = results.setdefault(name, speed)
            assert best["tokens"] == speed["tokens"], f"{name} decoded other tokens in another process"
            for key in ("token_seconds", "prompt_seconds", "memory_bytes"):
                best[key] = min(best[key], speed[key])
            progress.update(done + 1, f"{name}: {1e3 * best['token_seconds']:.2f} ms a token")
    return results


def _metrics(results: Mapping[str, DecodeSpeed]) -> dict[str, float]:
    """Speed over the original, and memory, by row."""
    original = results[_ORIGINAL]["token_seconds"]
    metrics: dict[str, float] = {}
    for name, speed in results.items():
        key = name.replace(", ", "_").replace(" ", "_").replace("/", "_")
        metrics[f"{key}_speed"] = original / speed["token_seconds"]
        metrics[f"{key}_memory_bytes"] = speed["memory_bytes"]
    return metrics


def _section(config: Config, results: Mapping[str, DecodeSpeed]) -> str:
    original = results[_ORIGINAL]
    rows = [
        [
            name,
            f"{1e3 * speed['token_seconds']:.2f}",
            f"{original['token_seconds'] / speed['token_seconds']:.2f}",
            f"{1e3 * speed['prompt_seconds']:.0f}",
            f"{speed['memory_bytes'] / 1e6:.0f}",
        ]
        for name, speed in results.items()
    ]
    version = next((speed["version"] for speed in results.values() if "version" in speed), None)
    text = [
        f"`hasten bench packed target={config.target}`: greedy, batch 1, one thread, CPU time; a token is the fastest "
        f"mean over 8 in succession, the prompt has {config.length} tokens; each row is the least of {config.rounds} "
        "alternating processes. Layers are rounded to nearest in symmetric groups of "
        f"{config.group_size}. MB: largest resident set while decoding, above that before the checkpoint is loaded."
        + (f" {_PEER} {version}." if version else ""),
        provenance(),
        table(["weights", "ms a token", "over the original", "prompt, ms", "MB"], rows),
    ]
    return "\n\n".join(text)
