"""What the jobs that measure a checkpoint share: the windows of held-out text, and the measuring with its progress."""

from pathlib import Path
from typing import Any

from hasten.jobs.common.schema import Evaluation

# Figures of a report that are null where nothing was measured.
FIGURES = ("perplexity", "perplexity_original", "kl_divergence", "top1_agreement")


def held_out_windows(evaluation: Evaluation, tokenizer: Any, folder: Path) -> Any:
    """Windows of the evaluation's text; None where it asks for no sequence."""
    from hasten.accel.evaluation.perplexity import load_windows
    from hasten.jobs.common.tokenizer import vocabulary_size

    if not evaluation.sequences:
        return None
    return load_windows(
        evaluation.source,
        tokenizer,
        evaluation.sequences,
        evaluation.sequence_length,
        evaluation.stride,
        vocabulary=vocabulary_size(folder),
    )


def measured(
    folder: Path, original: Path | None, windows: Any, workers: int, threads: int, device: str, **arithmetic: Any
) -> Any:
    """What hasten.cluster.programs.evaluation.measure returns, with a progress bar; inside a Ray session.

    arithmetic: dtype and batch, where they are not the defaults, and batch_option, what the batch is called.
    """
    from hasten.cluster.programs.evaluation import measure
    from hasten.jobs.common.progress import Progress

    with Progress("evaluate", min(workers, len(windows)), "part") as progress:
        return measure(
            folder,
            original,
            windows,
            workers,
            threads,
            device=device,
            gpus=1 if device == "cuda" else 0,
            progress=lambda done, total: progress.update(done),
            **arithmetic,
        )
