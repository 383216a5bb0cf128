"""Runs a hasten job or a peer's script in its own processes; returns its cost and what it wrote."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from hasten.accel.errors import UserError
from hasten.cluster.runtime import resources
from hasten.jobs.bench.processes.watch import Peak, Usage, watched
from hasten.jobs.cli.quotes import word

_LOG = logging.getLogger(__name__)
_PEERS = Path(__file__).parents[1] / "peers"
# A running Ray cluster or the number of cores must not change what is compared.
_ENVIRONMENT = {"RAY_ADDRESS": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_LINES_SHOWN = 15
# Outcome of a compression, beside its folder "model".
_OUTCOME = "outcome.json"


class ParetoRow(TypedDict):
    """A row of the allocator table in the report of `hasten search`; budget: bits per weight."""

    allocator: str
    budget: float
    bits_per_weight: float
    kl_divergence: float


class Report(TypedDict):
    """The part of a job's report.json that benchmarks read."""

    metrics: dict[str, float]
    pareto: NotRequired[list[ParetoRow]]


class PeerCaches(TypedDict):
    """Result of peers/kv_caches.py: figures by method, or an error, and versions of the packages."""

    rows: dict[str, dict[str, float | str]]
    versions: dict[str, str]


class PeerCompression(TypedDict):
    """Result of peers/llm_compressor.py, as far as it is read."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    version: str
    load_cpu_seconds: float
    save_cpu_seconds: float


class PeerSearch(TypedDict):
    """Result of peers/evopress.py; levels: bits by layer name."""

    cpu_seconds: float
    levels: dict[str, int]


class DecodeSpeed(TypedDict):
    """Result of processes/decode_speed.py and of peers/llama_cpp.py."""

    token_seconds: float
    prompt_seconds: float
    memory_bytes: int
    tokens: list[int]
    version: NotRequired[str]


@dataclass(frozen=True)
class Outcome:
    """A compressed folder and its cost.

    seconds, cpu_seconds: of the calibration pass. whole_seconds, whole_cpu_seconds: of all processes of the command
    from start to end, imports included. peak_rss_bytes: of the largest process. digest: of the files written.
    peaks: memory by process kind. files_cpu_seconds: of reading and writing the checkpoint, as far as these are not in
    cpu_seconds.
    """

    folder: Path
    seconds: float
    cpu_seconds: float
    whole_seconds: float
    whole_cpu_seconds: float
    peak_rss_bytes: int
    bytes: int
    digest: str
    version: str = ""
    peaks: Mapping[str, Peak] = field(default_factory=dict)
    files_cpu_seconds: float = 0.0


def hasten_compress(folder: Path, options: Mapping[str, object], interval: float = 2.0) -> Outcome:
    """Outcome of `hasten compress` with these options; the checkpoint is folder/model, the run directory folder/run.

    A folder that has an outcome of the same options and commit already keeps it, so that a benchmark that died goes on
    where it was. Raises UserError for a mistake in the options, RuntimeError with the end of the log for any other
    failure.
    """
    return _kept(folder, options, lambda: _hasten_compress(folder, options, interval))


def _hasten_compress(folder: Path, options: Mapping[str, object], interval: float) -> Outcome:
    report, usage = hasten_job(
        "compress", folder, {"evaluation.sequences": 0, "overwrite": "true", **options}, interval
    )
    metrics = report["metrics"]
    return Outcome(
        folder=folder / "model",
        seconds=metrics.get("calibration_seconds") or metrics["seconds"],
        cpu_seconds=metrics["cpu_seconds"],
        whole_seconds=usage.seconds,
        whole_cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=max(int(metrics["peak_rss_bytes"]), *(peak.rss_bytes for peak in usage.peaks.values())),
        bytes=_bytes(folder / "model"),
        digest=digest(folder / "model"),
        peaks=usage.peaks,
    )


def hasten_job(job: str, folder: Path, options: Mapping[str, object], interval: float = 2.0) -> tuple[Report, Usage]:
    """Report and usage of `hasten JOB` with these options; the output is folder/model, the run directory folder/run.

    Raises UserError for a mistake in the options, RuntimeError with the end of the log for any other failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {
        "output": folder / "model",
        "run_dir": folder / "run",
        "tracking.uri": f"sqlite:///{folder.resolve() / 'mlflow.db'}",
    }
    words = [word(key, value) for key, value in {**fixed, **options}.items()]
    log = folder / "hasten.out"
    usage = watched([sys.executable, "-P", "-m", "hasten", job, *words], log, _ENVIRONMENT, interval)
    check_status(usage, f"hasten {job}", log)
    report: Report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return report, usage


def peer_compress(python: str, folder: Path, options: Mapping[str, object]) -> Outcome:
    """Outcome of llm-compressor, run by the Python of its environment; options are those of the peer script.

    Kept as hasten_compress keeps its own.
    """
    return _kept(folder, {"python": python, **options}, lambda: _peer_compress(python, folder, options))


def _peer_compress(python: str, folder: Path, options: Mapping[str, object]) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    result, usage = _run_peer("llm_compressor", python, folder, {"output": folder / "model", **options})
    measured: PeerCompression = json.loads(result.read_text(encoding="utf-8"))
    return Outcome(
        folder=folder / "model",
        seconds=measured["wall_seconds"],
        cpu_seconds=measured["cpu_seconds"],
        whole_seconds=usage.seconds,
        whole_cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=measured["peak_rss_bytes"],
        bytes=_bytes(folder / "model"),
        digest=digest(folder / "model"),
        version=measured["version"],
        peaks=usage.peaks,
        files_cpu_seconds=measured["load_cpu_seconds"] + measured["save_cpu_seconds"],
    )


def _kept(folder: Path, options: Mapping[str, object], measure: Callable[[], Outcome]) -> Outcome:
    """The outcome in folder/outcome.json if it is of these options and of this commit; else a new one, stored there."""
    path = folder / _OUTCOME
    asked = {"options": {key: str(value) for key, value in options.items()}, "commit": resources.git_commit()}
    if path.is_file() and (folder / "model").is_dir():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in asked} == asked:
            _LOG.info("%s was measured before", folder)
            peaks = {kind: Peak(**peak) for kind, peak in stored["outcome"]["peaks"].items()}
            return Outcome(**{**stored["outcome"], "folder": folder / "model", "peaks": peaks})
    # Imports torch, see _bytes.
    from hasten.accel.outputs.resumable import write_whole

    outcome = measure()
    content = json.dumps({**asked, "outcome": asdict(outcome)}, default=str)
    write_whole(path, lambda unfinished: unfinished.write_text(content, encoding="utf-8"))
    return outcome


def peer_search(python: str, folder: Path, options: Mapping[str, object]) -> PeerSearch:
    """CPU seconds and levels of EvoPress's published search; options are those of the peer script."""
    folder.mkdir(parents=True, exist_ok=True)
    result, _ = _run_peer("evopress", python, folder, options)
    measured: PeerSearch = json.loads(result.read_text(encoding="utf-8"))
    return measured


def peer_decode(python: str, folder: Path, options: Mapping[str, object]) -> DecodeSpeed:
    """Speed of llama.cpp; options are those of the peer script."""
    folder.mkdir(parents=True, exist_ok=True)
    result, _ = _run_peer("llama_cpp", python, folder, options)
    measured: DecodeSpeed = json.loads(result.read_text(encoding="utf-8"))
    return measured


def peer_caches(python: str, folder: Path, options: Mapping[str, object]) -> PeerCaches:
    """Figures of the peers' KV caches; options are those of the peer script."""
    folder.mkdir(parents=True, exist_ok=True)
    result, _ = _run_peer("kv_caches", python, folder, options)
    measured: PeerCaches = json.loads(result.read_text(encoding="utf-8"))
    return measured


def _run_peer(name: str, python: str, folder: Path, options: Mapping[str, object]) -> tuple[Path, Usage]:
    """The JSON file that a peer script wrote, and what its process used."""
    result, log = folder / "result.json", folder / "peer.out"
    words = [word for key, value in {"result": result, **options}.items() for word in _flag(key, value)]
    # Without PYTHONPATH, so that the peer imports nothing of hasten's checkout.
    usage = watched([python, str(_PEERS / f"{name}.py"), *words], log, {**_ENVIRONMENT, "PYTHONPATH": ""}, 2.0)
    check_status(usage, name, log)
    return result, usage


def check_peer(python: str, package: str = "llmcompressor") -> None:
    """Raise UserError if the peer's Python cannot be run or lacks the peer's package."""
    if not Path(python).is_file():
        raise UserError(f"peer_python={python}: no such file; give the bin/python of an environment with {package}")
    script = f"import importlib.metadata as metadata; metadata.version({package!r})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        # -P: the current folder may contain modules of the same names.
        subprocess.run([python, "-P", "-c", script], env=environment, capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"peer_python={python} has no {package}: pip install {package} there") from None


def digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over names and bytes of all files of a folder, except hidden ones.

    Hidden files hold the progress of a run and are not part of the checkpoint.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        with path.open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _flag(key: str, value: object) -> list[str]:
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name] if value else []
    return [name, str(value)]


def _bytes(folder: Path) -> int:
    # Imports torch, which `hasten bench NAME --help` must not wait for.
    from hasten.accel.evaluation.sizes import disk_bytes

    return disk_bytes(folder)


def check_status(usage: Usage, name: str, log: Path) -> None:
    """Raise UserError with a job's own message if it refused its options, RuntimeError if it failed otherwise."""
    if usage.status == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    mistakes = [line for line in lines if line.startswith("hasten: error: ")]
    if usage.status == 2 and mistakes:
        raise UserError(mistakes[-1].removeprefix("hasten: error: "))
    end = "\n".join(lines[-_LINES_SHOWN:])
    raise RuntimeError(f"{name} ended with status {usage.status}; the end of {log}:\n{end}")
