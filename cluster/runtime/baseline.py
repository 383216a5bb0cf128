"""Measures the memory and CPU time that a process takes for its imports and first calls, before any work.

`python -m hasten.cluster.runtime.baseline` prints a line of JSON: bytes and CPU seconds of a worker, which has run each
kind of arithmetic once, bytes of a driver, and its additional CPU seconds; a driver also tracks, plots and reads text.
"""

import json


def main() -> None:
    """Print worker_bytes, start, driver_bytes and finish."""
    import ray._private.workers.default_worker  # noqa: F401

    _as_worker()
    from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes

    started, worker = cpu_seconds(), peak_rss_bytes()
    _as_driver()
    measured = {
        "worker_bytes": worker,
        "start": started,
        "driver_bytes": peak_rss_bytes(),
        "finish": cpu_seconds() - started,
    }
    print(json.dumps(measured), flush=True)


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
