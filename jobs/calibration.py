"""What the jobs that calibrate share: their tokens, and the pass with its progress."""

import logging
from pathlib import Path
from typing import Any

from jobs.schema import Calibration

_LOG = logging.getLogger(__name__)


def calibration_tokens(calibration: Calibration, quantizer: Any, tokenizer: Any, source: Path) -> Any:
    """Tokens [sequences, T]; None for a quantizer that needs none. tokenizer may be None for a file of tokens."""
    from accel.data.tokens import load_tokens
    from jobs.tokenizer import vocabulary_size

    if not quantizer.needs_second_moment:
        return None
    return load_tokens(
        calibration.source,
        tokenizer,
        calibration.sequences,
        calibration.sequence_length,
        "train",
        calibration.seed,
        vocabulary_size(source),
    )


def run_pass(compression: Any, title: str, tracker: Any) -> None:
    """Run a calibration pass with a progress bar over its blocks, each of which is a step of the tracked run."""
    from jobs.progress import Progress

    architecture, output = compression.task.architecture, compression.task.output
    finished = len(output.finished)
    if finished:
        _LOG.info("%d of %d blocks are finished already in %s", finished, architecture.num_blocks, output.path)
    with Progress(title, architecture.num_blocks, "block") as progress:
        progress.begin(finished)

        def note(count: int, row: dict[str, Any]) -> None:
            progress.update(finished + count, f"error {row['error']:.2e}")
            tracker.metrics({"block_error": row["error"], "block_seconds": row["seconds"]}, step=row["block"])

        compression.run(note)
