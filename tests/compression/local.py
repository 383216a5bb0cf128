"""A whole compression in this process, by the calibrator that Ray runs as an actor."""

from pathlib import Path
from typing import Any

import torch

from hasten.accel.compression.calibration.chunks import chunks_of
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.quantizers.base import Quantizer, Scheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.transforms.learning import learn
from hasten.accel.compression.transforms.rotation import RotationGradient
from hasten.cluster.actors.calibrator import ATTENTION_KEY, Calibrator


def settings(checkpoint: Path, output: Path, quantizer: Quantizer | None = None, **changes: Any) -> Settings:
    """Settings for a tiny checkpoint: 4 bits in groups of 32, few tokens. scheme: of the level, if it is a grid."""
    values: dict[str, Any] = {"format": CompressedTensors(), "batch": 2, "expert_tokens": 8}
    values["level"] = GridLevel(changes.pop("scheme", Scheme(4, 32)))
    return Settings(checkpoint, output, quantizer or GPTQ(), **(values | changes))


def transform(task: Task, calibrators: list[Calibrator], block: int) -> None:
    """Make the edits of a block, and of blocks before it that have none yet, by calibrators in turn."""
    sequence = task.transforms
    for number in [] if sequence is None else sequence.unfinished(block):

        def collect(place, keys, edits, number=number):
            stage = place - len(sequence.transforms)
            return [calibrator.collect(number, keys, stage, edits) for calibrator in calibrators]

        def solve(place, parts, collected, edits, statistics, number=number):
            pairs = (collected, edits)
            return {
                part.key: calibrators[index % len(calibrators)].transform(
                    number, place, [part.key], pairs, *(statistics or [])
                )[0]
                for index, part in enumerate(parts)
            }

        sequence.write(task.architecture, number, collect, solve)


def rotate(chosen: Settings, task: Task, calibrators: list[Calibrator], tokens: torch.Tensor) -> None:
    """Make the rotation of the model, if a transform rotates it, by calibrators in turn."""

    def gradients(rotation, parts):
        arrays = rotation.residual.numpy(), [matrix.numpy() for matrix in rotation.heads]
        answers = [calibrators[index % len(calibrators)].rotate(arrays, part)[0] for index, part in enumerate(parts)]
        return [
            RotationGradient(count, total, torch.from_numpy(residual), tuple(map(torch.from_numpy, heads)))
            for count, total, residual, heads in answers
        ]

    if chosen.rotating is not None:
        learn(chosen.rotating, task.rotation, task.unrotated, tokens, chosen.batch, gradients)


def calibrators_of(chosen: Settings, tokens: torch.Tensor, workers: int = 1) -> list[Calibrator]:
    """Calibrators that share the tokens."""
    shards = chunks_of(chosen.shards, tokens if chosen.needs_tokens else None, workers)
    return [Calibrator(chosen, chunks) for chunks in shards]


def compress(chosen: Settings, tokens: torch.Tensor, workers: int = 1) -> list[dict[str, Any]]:
    """Compress and return the facts of all layers."""
    task = Task(chosen)
    task.output.open(chosen.fingerprint(task.checkpoint, tokens), overwrite=False)
    needed = chosen.needs_inputs
    calibrators = calibrators_of(chosen, tokens, workers)
    rotate(chosen, task, calibrators, tokens)
    rows = []
    with torch.no_grad():
        for block in sorted(set(range(len(task.layer_groups))) - set(task.output.finished)):
            transform(task, calibrators, block)
            unfinished = {group.key for group in task.output.unfinished(block)}
            solved: list[dict[str, Any]] = []
            done = []
            for number, stage in enumerate(task.stages(block)):
                keys = [group.key for group in stage if group.key in unfinished]
                attention = [ATTENTION_KEY] if task.calibrates_attention(block, number) else []
                runs = calibrators if needed and (keys or attention) else []
                collected = [calibrator.collect(block, keys, number, *solved) for calibrator in runs]
                packed, facts, _ = calibrators[-1].solve(block, [*keys, *attention], *collected)
                solved.append(packed)
                done += facts
            task.output.write_block(block, {name: parts for packed in solved for name, parts in packed.items()}, done)
            rows += done
        transform(task, calibrators, task.architecture.num_blocks - 1)
    task.output.finish()
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
