"""`hasten train_drafter`: trains the head that a drafter needs, on texts that target and draft model process."""

from collections.abc import Sized
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.accel.data.documents import LIBRARY
from hasten.accel.data.tokens import load_tokens
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.training.heads.base import Head, HeadModels
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.arithmetic import resolve_device, resolve_dtype
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.prompts import check_tokenizers, model_folder
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import begin_of, load_tokenizer, vocabulary_size
from hasten.jobs.train_drafter.head import chosen_head
from hasten.jobs.train_drafter.options import TrainDrafterConfig

_STEPS_BETWEEN_LOSSES = 10


def run(config: TrainDrafterConfig) -> Path:
    """Train a head for config.target and config.draft; returns the path of report.json.

    Raises UserError, before anything is written, for models, texts and outputs that do not fit.
    """
    started = perf_counter()
    head = chosen_head(config)
    folders = {"target": model_folder("target", config.target)}
    if head.needs_draft_model:
        folders["draft"] = model_folder("draft", config.draft)
        check_tokenizers(folders["target"], folders["draft"])
    fingerprint = Checkpoint(folders[head.reads]).fingerprint()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    texts = _texts(config, folders)
    if config.output is not None:
        _check_output(Path(config.output))
    torch.set_num_threads(config.threads)

    run_dir = start(config)
    output = Path(config.output).absolute() if config.output else run_dir.absolute() / head.file
    with tracked(config, "train_drafter", run_dir) as tracker:
        tracker.params(plain(config))
        train, held_out = _examples(config, head, folders, texts, dtype, device)
        network = _fit(head, train, config.seed, device, tracker)
        quality = head.measure(network, held_out)
        head.save(network, output, fingerprint)
        metrics = quality.metrics() | {
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
            **quality.tables(),
            "output": str(output),
        }
        path: Path = tracker.report(report)
    print("\n".join(quality.summary()))
    print(f"to use it: drafter={head.drafter} drafter.head={as_given(output)}")
    return path


def _texts(config: TrainDrafterConfig, folders: dict[str, Path]) -> tuple[Tensor, Tensor]:
    """Token ids (S, T) to train on and to measure on."""
    text, tokenizer = config.text, load_tokenizer(folders["target"], config.template)
    begin = begin_of(folders["target"], tokenizer, config.bos)
    # Models may have vocabulary rows beyond the tokenizer's ids, and different numbers of them.
    vocabulary = min(vocabulary_size(folder) for folder in folders.values())
    if text.source == LIBRARY:
        train, held_out = (
            load_tokens(LIBRARY, tokenizer, count, text.sequence_length, split, text.seed, vocabulary, begin=begin)
            for count, split in ((text.sequences, "train"), (text.held_out, "held_out"))
        )
        return train, held_out
    # Only the library has held-out files; of other texts the last sequences are held out.
    count = text.sequences + text.held_out
    tokens = load_tokens(
        text.source, tokenizer, count, text.sequence_length, "train", text.seed, vocabulary, begin=begin
    )
    return tokens[: text.sequences], tokens[text.sequences :]


def _check_output(output: Path) -> None:
    if output.exists():
        raise UserError(f"output={output} exists already: give the path of a new file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={output} cannot be made: {output.absolute().parent} is no folder")


def _examples(
    config: TrainDrafterConfig,
    head: Head[Sized, nn.Module],
    folders: dict[str, Path],
    texts: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    device: str,
) -> tuple[Sized, Sized]:
    """Examples of the head to train on and to measure on."""
    models = HeadModels(**{name: _loaded(folder, dtype, device) for name, folder in folders.items()})
    examples: list[Sized] = []
    with Progress("reading", sum(map(len, texts)), "sequence") as progress:
        done = 0
        for number, tokens in enumerate(texts):
            generator = torch.Generator(device).manual_seed(2 * config.seed + number)

            def advance(count: int, before: int = done) -> None:
                progress.update(before + count)

            examples.append(head.collect(models, tokens, generator, config.text.batch, advance))
            done += len(tokens)
    return examples[0], examples[1]


def _loaded(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    # Registers the loader of checkpoints that transformers alone refuses.
    import hasten.accel.models.transformers_loader  # noqa: F401

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]  # the types of its wrapper are wrong


def _fit(head: Head[Sized, nn.Module], examples: Sized, seed: int, device: str, tracker: Tracker) -> nn.Module:
    steps = head.steps(len(examples))
    losses: list[float] = []
    with Progress("training", steps, "step") as progress:

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            if step % _STEPS_BETWEEN_LOSSES == 0 or step == steps:
                mean = sum(losses) / len(losses)
                tracker.metrics({"train_loss": mean}, step)
                progress.update(step, f"loss {mean:.4f}")
                losses.clear()

        return head.fit(examples, seed, device, report)
