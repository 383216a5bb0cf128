"""Shared by jobs that evaluate a checkpoint: the evaluation with its progress."""

from pathlib import Path

import torch

from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.programs.evaluation import Measured, measure
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.progress import Progress

# Metrics that are null in a report if nothing was measured.
FIGURES = ("perplexity", "perplexity_original", "kl_divergence", "top1_agreement")


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
