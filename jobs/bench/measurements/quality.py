"""Inputs of `hasten bench compress`, and the quality of compressed checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hasten.accel.compression.calibration.group_sizes import AUTO_SIZES, auto_group_size
from hasten.accel.errors import UserError
from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.jobs.common.schema import Calibration, Evaluation
from hasten.jobs.common.texts import Texts


@dataclass(frozen=True)
class Quality:
    """Measures checkpoints on held-out windows; on the first `divergence` of them against the original."""

    original: Path
    windows: Windows
    divergence: int

    def measure(self, folder: Path) -> dict[str, float | int | None]:
        """`perplexity` of all windows, and `kl_divergence` and `perplexity_original` of the first ones."""
        model, original = Architecture(Checkpoint(folder)), Architecture(Checkpoint(self.original))
        first, remaining = self.windows[: self.divergence], self.windows[self.divergence :]
        sums = evaluate(model, first, original) + (evaluate(model, remaining) if len(remaining) else Sums())
        return sums.metrics()


def inputs(
    name: str, calibration: Calibration, source: str | None, windows: int, divergence: int
) -> tuple[Path, Tensor, Quality]:
    """Folder of the original, calibration windows (N, T), and the measurement on held-out windows.

    name: of the model. source: of the held-out text. divergence: number of windows for it. Raises UserError for a model
    or a text that cannot be loaded.
    """
    model = resolve(name)
    texts = Texts(model, "auto", None)
    tokens = texts.calibrate(calibration, is_needed=True)
    held_out = texts.evaluate(Evaluation(source, windows, sequence_length=calibration.sequence_length))
    assert tokens is not None
    assert held_out is not None, "windows=0"
    return model, tokens, Quality(model, held_out, divergence)


def common_group_size(model: Path) -> int:
    """The largest of 128, 64 and 32 that divides the columns of all layers; UserError where none does."""
    architecture = Architecture(Checkpoint(model))
    layers = [layer for block in range(architecture.num_blocks) for layer in architecture.linears(block)]
    size = auto_group_size(layer.columns for layer in layers)
    if size not in AUTO_SIZES:
        raise UserError(f"group_size=auto finds no size: none of {AUTO_SIZES} divides the columns of all layers")
    return size


def save_tokens(tokens: Tensor, path: Path) -> Path:
    """Save token ids as .npy; returns path."""
    np.save(path, tokens.numpy())
    return path
