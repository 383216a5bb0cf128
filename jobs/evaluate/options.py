"""Options of `hasten evaluate`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import (
    ADDRESS,
    BOS,
    BOS_CHOICES,
    DEVICES,
    DTYPES,
    GATE,
    MODEL,
    TEMPLATE,
    WORKER_GPUS,
    WORKER_MEMORY,
    Evaluation,
    Run,
    TargetGroup,
    option,
    section,
)


@dataclass
class EvaluateConfig(Run):
    """Measure a checkpoint: perplexity, divergence from the original, exact bits per weight, bytes."""

    model: str = option("embedded:target", f"what to measure, compressed or not: {MODEL}", path="in")
    original: str | None = option(
        None, "uncompressed checkpoint to compare with; null is the one that a compressed checkpoint names", path="in"
    )
    template: str | None = option(None, TEMPLATE, path="in")
    tasks: list[str] = option([], "tasks of lm-eval to run, which needs the extra hasten[eval]")
    gate: list[str] = option([], GATE)
    dtype: str = option("float32", "dtype of the arithmetic", choices=DTYPES)
    device: str = option("auto", "where to compute; auto is cuda where there is one", choices=DEVICES)
    batch: int = option(8, "sequences that are run at once", at_least=1)
    workers: int = option(2, "processes that share the sequences", at_least=1)
    threads: int = option(1, "threads of every process", at_least=1)
    worker_gpus: float | None = option(None, WORKER_GPUS, at_least=0)
    worker_memory: str | None = option(None, WORKER_MEMORY)
    address: str | None = option(None, ADDRESS)
    bos: str = option("auto", BOS, choices=BOS_CHOICES)
    evaluation: Evaluation = section(Evaluation)
    target_group: TargetGroup = section(TargetGroup)
