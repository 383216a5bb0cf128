"""Options of `hasten kv_heads`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import (
    ADDRESS,
    BOS,
    BOS_CHOICES,
    DEVICES,
    DTYPES,
    MODEL,
    SOURCE,
    TEMPLATE,
    WORKER_GPUS,
    WORKER_MEMORY,
    Run,
    option,
)


@dataclass
class KVHeadsConfig(Run):
    """Join heads of keys and values of a checkpoint, whose caches become as many times smaller; resumable."""

    model: str = option("embedded:target", f"model whose heads are joined: {MODEL}", path="in")
    group: int = option(2, "KV heads that become one", at_least=2)
    keys: str = option(
        "directions",
        "what a group's keys become: directions, of their largest part on calibration text; or their mean",
        choices=("directions", "mean"),
    )
    output: str | None = option(None, "folder of the checkpoint; null is runs/kv_heads/NAME-GROUP", path="out")
    overwrite: bool = option(False, "start again where an earlier run with other settings has begun")
    source: str = option("library", f"text that the calibration tokens come from: {SOURCE}", path="in")
    sequences: int = option(16, "calibration sequences", at_least=1)
    sequence_length: int = option(512, "tokens in a calibration sequence, with those that begin it", at_least=2)
    template: str | None = option(None, TEMPLATE, path="in")
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    shards: int = option(4, "parts of the sequences, a task each; a finished part is not computed again", at_least=1)
    batch: int = option(4, "sequences that run through a block at once", at_least=1)
    dtype: str = option("float32", "dtype of the arithmetic", choices=DTYPES)
    device: str = option("auto", "where the tasks compute; auto is cuda where there is one", choices=DEVICES)
    workers: int = option(2, "tasks at a time; their number changes the time and not the output", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)
