"""`hasten train_drafter`: train the network that a drafter needs, on texts that a target and a draft model read."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hasten.accel.data.tokens import LIBRARY, load_tokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.accel.training.heads.acceptance_training import AcceptanceTraining, Examples
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.compose import plain
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import check_tokenizers, model_folder
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.tokenizer import load_tokenizer, vocabulary_size
from hasten.jobs.train_drafter.options import DrafterText, TrainDrafterConfig

_LOG = logging.getLogger(__name__)
_STEPS_BETWEEN_FIGURES = 10


def run(config: TrainDrafterConfig) -> Path:
    """Train for config.target and config.draft; returns the path of report.json.

    Raises UserError, with nothing written, for models, texts and outputs that do not fit.
    """
    started = perf_counter()
    target, draft = (model_folder(name, getattr(config, name)) for name in ("target", "draft"))
    check_tokenizers(target, draft, reads_draft_probs=False)
    fingerprint = Checkpoint(draft).fingerprint()
    training = AcceptanceTraining(
        config.blocks, config.mixing, config.reject_weight, config.epochs, config.lr, batch=config.batch
    )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    texts = _texts(config.text, target, draft)
    if config.output is not None:
        _check_output(Path(config.output))
    torch.set_num_threads(config.threads)

    run_dir = start(config)
    output = Path(config.output).absolute() if config.output else run_dir.absolute() / FILE
    with tracked(config, "train_drafter", run_dir) as tracker:
        tracker.params(plain(config))
        train, held_out = _examples(config, training, (target, draft), texts, dtype, device)
        head = _fit(training, train, config.seed, device, tracker)
        quality = dataclasses.asdict(training.measure(head, held_out))
        head.save(output, fingerprint)
        calibration = quality.pop("calibration")
        metrics: Record = quality | {
            "tokens": len(train),
            "held_out_tokens": len(held_out),
            "bytes": output.stat().st_size,
            "seconds": perf_counter() - started,
            "cpu_seconds": cpu_seconds(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        report = {
            "job": "train_drafter",
            "config": plain(config),
            "metrics": metrics,
            "layers": [],
            "calibration": calibration,
            "output": str(output),
        }
        path = tracker.report(report)
    _print_summary(metrics, calibration, output)
    return path


def _texts(text: DrafterText, target: Path, draft: Path) -> tuple[Tensor, Tensor]:
    """Token ids to train on and to measure on."""
    tokenizer = load_tokenizer(target)
    # A model may have rows for ids that no tokenizer makes, and the other fewer of them.
    vocabulary = min(vocabulary_size(target), vocabulary_size(draft))
    if text.source == LIBRARY:
        train, held_out = (
            load_tokens(LIBRARY, tokenizer, count, text.sequence_length, split, text.seed, vocabulary)
            for count, split in ((text.sequences, "train"), (text.held_out, "held_out"))
        )
        return train, held_out
    # Only the library has a split of its own.
    count = text.sequences + text.held_out
    found = load_tokens(text.source, tokenizer, count, text.sequence_length, "train", text.seed, vocabulary)
    return found[: text.sequences], found[text.sequences :]


def _check_output(output: Path) -> None:
    if output.exists():
        raise UserError(f"output={output} is there already: give the path of a new file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={output} cannot be made: {output.absolute().parent} is no folder")


def _examples(
    config: TrainDrafterConfig,
    training: AcceptanceTraining,
    folders: tuple[Path, Path],
    texts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    device: str,
) -> tuple[Examples, Examples]:
    """What both models say about the texts, to train on and to measure on."""
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders]
    models = [model.to(device).eval() for model in models]
    found = []
    with Progress("reading", sum(map(len, texts)), "sequence") as progress:
        done = 0
        for number, tokens in enumerate(texts):
            generator = torch.Generator(device).manual_seed(2 * config.seed + number)
            report = partial(_read_more, progress, done)
            found.append(
                training.collect(
                    models[0],
                    models[1],
                    tokens,
                    generator,
                    config.text.batch,
                    report,
                )
            )
            done += len(tokens)
    return found[0], found[1]


def _read_more(progress: Progress, before: int, count: int) -> None:
    progress.update(before + count)


def _fit(training: AcceptanceTraining, examples: Examples, seed: int, device: str, tracker: Tracker) -> AcceptanceHead:
    steps = training.steps(len(examples))
    losses: list[float] = []
    with Progress("training", steps, "step") as progress:

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            if step % _STEPS_BETWEEN_FIGURES == 0 or step == steps:
                mean = sum(losses) / len(losses)
                tracker.metrics({"train_loss": mean}, step)
                progress.update(step, f"loss {mean:.4f}")
                losses.clear()

        return training.fit(examples, seed, device, report)


def _print_summary(metrics: Record, calibration: list[dict[str, float]], output: Path) -> None:
    print(
        f"held-out loss {metrics['loss']:.4f}, AUC {metrics['auc']:.3f} of at most {metrics['auc_best']:.3f}; of the "
        f"drafted tokens {metrics['accepted']:.1%} are accepted"
    )
    print("tokens    predicted  weight out  accepted")
    for row in calibration:
        print(f"{row['tokens']:<9} {row['predicted']:<10.3f} {row['unweighted']:<11.3f} {row['accepted']:.3f}")
    print(f"to use it: drafter=specdec_pp drafter.head={as_given(output)}")
