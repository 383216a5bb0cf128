"""Shared by jobs that evaluate a checkpoint: the evaluation with its progress."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.accel.evaluation.guessing import is_guessing
from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.actors.rank_evaluator import Measured
from hasten.cluster.programs.evaluation import measure
from hasten.cluster.runtime.placement import ActorResources
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record

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
    division: Division | None = None,
) -> Measured:
    """Result of hasten.cluster.programs.evaluation.measure, with a progress bar; inside a Ray session.

    needs: resources of each worker, or of each rank where the worker is divided. batch: windows that run at once.
    batch_option: name of the batch size in messages about too little memory.
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
            division=division,
        )


def quality_warnings(metrics: Mapping[str, Any], texts: Mapping[str, Record | None]) -> list[str]:
    """Lines for a report and the last lines of a run whose models do not predict the text at all.

    metrics: of FIGURES. texts: the report's entries on texts. A divergence from an original that guesses is small
    whatever was compressed: a damaged weight or a wrong tokenizer would pass as a perfect compression.
    """
    text = texts["evaluation"]
    if text is None or metrics["perplexity"] is None:
        return []
    guessing: float = text["guessing_perplexity"]
    name, perplexity = "the original", metrics["perplexity_original"]
    if perplexity is None or not is_guessing(perplexity, guessing):
        name, perplexity = "the model", metrics["perplexity"]
    if not is_guessing(perplexity, guessing):
        return []
    value = f"{perplexity:.1f} is that of guessing" if math.isfinite(perplexity) else f"{perplexity} is not finite"
    consequence = "" if name == "the model" else ": KL divergence and agreement with it say nothing"
    return [
        f"{name}'s perplexity of {value} (who knows only how often tokens occur has {guessing:.1f} on this text)"
        f"{consequence}; check weights and tokenizer"
    ]


def print_warnings(report: Record) -> None:
    """Print the report's warnings, a line each."""
    for warning in report["warnings"]:
        print(f"warning: {warning}")
