"""Shared by jobs that evaluate a checkpoint: windows of held-out text, and the evaluation with its progress."""

from pathlib import Path

import torch

from hasten.accel.evaluation.perplexity import Windows, load_windows
from hasten.cluster.programs.evaluation import Measured, measure
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.schema import Evaluation
from hasten.jobs.common.tokenizer import Tokenizer, vocabulary_size

# Metrics that are null in a report if nothing was measured.
FIGURES = ("perplexity", "perplexity_original", "kl_divergence", "top1_agreement")


def held_out_windows(evaluation: Evaluation, tokenizer: Tokenizer | None, folder: Path) -> Windows | None:
    """Windows of the evaluation text; None for evaluation.sequences=0."""
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
    folder: Path,
    original: Path | None,
    windows: Windows,
    workers: int,
    needs: ActorResources,
    device: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    batch_option: str = "windows at once",
) -> Measured:
    """Result of hasten.cluster.programs.evaluation.measure, with a progress bar; inside a Ray session.

    needs: resources of each worker. batch: windows that run at once. batch_option: name of the batch size in messages
    about too little memory.
    """
    with Progress("evaluate", min(workers, len(windows)), "part") as progress:
        return measure(
            folder,
            original,
            windows,
            workers,
            needs,
            device=device,
            progress=lambda done, total: progress.update(done),
            dtype=dtype,
            batch=batch,
            batch_option=batch_option,
        )
