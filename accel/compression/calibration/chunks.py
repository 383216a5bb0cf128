"""Chunks of the calibration sequences, and which calibrator owns which."""

from torch import Tensor

from hasten.accel.compression.calibration.statistics import split
from hasten.accel.errors import UserError


def chunks_of(shards: int, tokens: Tensor | None, workers: int, ranks: int = 1) -> list[dict[int, Tensor]]:
    """For each calibrator its chunks of calibration sequences by number; empty if none are needed.

    shards: number of chunks, where there are as many sequences. ranks: calibrators of a worker.
    """
    if tokens is None or not len(tokens):
        return [{} for _ in range(workers * ranks)]
    chunks = tokens.tensor_split(min(shards, len(tokens)))
    check_chunks(len(chunks), workers, ranks)
    return [{number: chunks[number] for number in part} for part in split(len(chunks), workers * ranks)]


def check_chunks(chunks: int, workers: int, ranks: int = 1) -> None:
    """UserError where there are more calibrators than chunks of the calibration sequences. ranks: of a worker."""
    if workers * ranks <= chunks:
        return
    given = f"workers={workers}" + (f" of target_group.size={ranks}" if ranks > 1 else "")
    use = f"use workers={chunks // ranks}, or" if chunks >= ranks else "use"
    raise UserError(
        f"{given} is more than the {chunks} chunks of the calibration sequences: {use} more calibration.shards"
    )
