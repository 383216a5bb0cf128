"""Measures the memory and CPU time that a process takes for its imports and first calls, before any work.

`python -m hasten.cluster.runtime.baseline` prints a line of JSON: bytes and CPU seconds of a worker, which has run each
kind of arithmetic once, bytes of a driver, and its additional CPU seconds; a driver also tracks, plots and reads text.
"""

import json
import os


def main() -> None:
    """Print worker_bytes, start, driver_bytes and finish."""
    from hasten.cluster.runtime.prefork import can_fork, template
    from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes

    template.import_all({})
    worker = _bytes_of_a_fork() if can_fork() else None
    _as_worker()
    started, worker = cpu_seconds(), worker or peak_rss_bytes()
    _as_driver()
    measured = {
        "worker_bytes": worker,
        "start": started,
        "driver_bytes": peak_rss_bytes(),
        "finish": cpu_seconds() - started,
    }
    print(json.dumps(measured), flush=True)


def _bytes_of_a_fork() -> int:
    """Bytes of a worker that is forked, which has read few of the libraries' pages."""
    from hasten.cluster.runtime.resources import peak_rss_bytes

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _as_worker()
            os.write(writing, str(peak_rss_bytes()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as line:
        found = line.read()
    os.waitpid(child, 0)
    return int(found or 0)


def _as_worker() -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    import hasten.cluster.actors.calibrator  # noqa: F401
    from hasten.accel.compression.calibration.settings import Task  # noqa: F401
    from hasten.accel.models.architecture import Architecture
    from hasten.accel.models.checkpoint import Checkpoint, resolve

    torch.set_grad_enabled(False)
    architecture = Architecture(Checkpoint(resolve("embedded:draft")))
    hidden = architecture.embed(torch.zeros(1, 64, dtype=torch.long))
    architecture.head(architecture.run_block(architecture.load_block(0), 0, hidden))
    torch.linalg.cholesky_ex(torch.eye(64))
    pack_to_int32(torch.zeros(8, 64, dtype=torch.int8), 4)


def _as_driver() -> None:
    import matplotlib.pyplot  # noqa: F401

    from hasten.accel.data.tokens import load_tokens
    from hasten.accel.models.checkpoint import resolve
    from hasten.cluster.tracking.store import import_mlflow

    import_mlflow()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:draft"))
    load_tokens("library", tokenizer, 32, 512, "train", 0, 4096)


if __name__ == "__main__":
    main()
