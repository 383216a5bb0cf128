"""`hasten pretrain`: trains a tokenizer, a target and a draft model from scratch on the standard library's sources.

The recall variant of a target is fine-tuned, see recall.py.

The output folder holds a transformers checkpoint per model, and `state/`, from which a stopped training resumes.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hasten.accel.data.library import library_files, library_root, read_texts
from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.pretraining import (
    Schedule,
    Shape,
    bits_per_byte,
    build,
    encode_documents,
    train_in_processes,
    train_tokenizer,
)
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.run import start, tracked
from hasten.jobs.common.schema import plain
from hasten.jobs.common.tokenizer import Tokenizer
from hasten.jobs.pretrain import recall
from hasten.jobs.pretrain.model_card import model_card
from hasten.jobs.pretrain.options import PretrainConfig, Training

_LOG = logging.getLogger(__name__)
MODELS = ("target", "draft")
RECALL = "recall"
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_POLL_SECONDS = 2.0


def run(config: PretrainConfig) -> Path:
    """Train the models of config.models; returns the path of report.json.

    Raises UserError, before anything is written, for contradicting options, a folder without text, and an output that
    holds other files or a training with other settings.
    """
    _check(config)
    root = Path(config.library) if config.library else library_root()
    train_files, held_out_files = _files(root)
    settings = _settings(config, root, train_files)
    output = Path(config.output)
    _claim(output, settings, config.overwrite, write=False)

    run_dir = start(config)
    started = time.time()
    _claim(output, settings, config.overwrite, write=True)
    with tracked(config, "pretrain", run_dir) as tracker:
        tracker.params(plain(config))
        models = {}
        scratch = [model for model in config.models if model != RECALL]
        if scratch:
            tokenizer, stream = _tokens(config, output / "state", root, train_files)
            files = len(train_files), len(held_out_files)
            _LOG.info("%d files to train on, %d held out, %d training tokens", *files, len(stream))
        for model in scratch:
            weights = _train(model, config, output / "state", run_dir, tokenizer, stream, tracker)
            folder = _save(model, config, tokenizer, weights)
            facts = _measure(model, config, folder, root, held_out_files, tokenizer)
            facts |= {"train_files": len(train_files), "held_out_files": len(held_out_files)}
            models[model] = facts
            (folder / "README.md").write_text(model_card(model, facts, config), encoding="utf-8")
        if RECALL in config.models:
            models[RECALL] = recall.fine_tune(config, root, train_files, held_out_files, tracker)
        children = os.times()
        metrics: Record = {f"{model}.{name}": value for model, facts in models.items() for name, value in facts.items()}
        metrics |= {
            "seconds": time.time() - started,
            "cpu_seconds": cpu_seconds() + children.children_user + children.children_system,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        report = {"job": "pretrain", "config": plain(config), "metrics": metrics, "layers": [], "output": str(output)}
        return tracker.report(report)


def _check(config: PretrainConfig) -> None:
    known = (*MODELS, RECALL)
    unknown = [model for model in config.models if model not in known]
    if unknown or not config.models or len(set(config.models)) < len(config.models):
        raise UserError(f"models={config.models} is wrong: expected some of {', '.join(known)}")
    if RECALL in config.models:
        recall.check(config.recall)
    for model in config.models:
        if model == RECALL:
            continue
        training = getattr(config, model)
        stages = training.depths
        if not stages or any(len(stage) != 2 or min(stage) < 1 for stage in stages):
            raise UserError(f"{model}.depths={stages} is wrong: expected stages [layers, tokens], each 1 or more")
        if any(earlier[0] > later[0] for earlier, later in itertools.pairwise(stages)):
            raise UserError(f"{model}.depths={stages} is wrong: a model gains layers and never loses any")
        if training.heads % training.kv_heads:
            raise UserError(f"{model}.kv_heads={training.kv_heads} must divide {model}.heads={training.heads}")
        if training.head_dim % 2:
            raise UserError(f"{model}.head_dim={training.head_dim} must be even: positions turn pairs of numbers")
        if training.batch % config.workers:
            raise UserError(f"workers={config.workers} must divide {model}.batch={training.batch}")


def _files(root: Path) -> tuple[list[str], list[str]]:
    """Paths below root: the files to train on, and the held-out files."""
    if not root.is_dir():
        raise UserError(f"library={root} is no folder: expected one with .py files")
    train, held_out = library_files("train", root), library_files("held_out", root)
    for split, names in (("train on", train), ("hold out", held_out)):
        if not names:
            raise UserError(f"library={root} has no .py file to {split}: one file in twenty is held out, add files")
    return train, held_out


def _settings(config: PretrainConfig, root: Path, train_files: list[str]) -> Record:
    """All settings that affect the result, with flat keys; the number of processes does not."""
    digest = hashlib.sha256()
    for name in train_files:
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    settings: Record = {
        "text": digest.hexdigest()[:16],
        "vocab_size": config.vocab_size,
        "seed": config.seed,
    }
    for model in config.models:
        for key, value in dataclasses.asdict(getattr(config, model)).items():
            settings[f"{model}.{key}"] = value
    return settings


def _claim(output: Path, settings: Record, overwrite: bool, write: bool) -> None:
    """UserError if output holds something else than this training; with write, mark it, after emptying on overwrite."""
    mark = output / "state" / "settings.json"
    earlier: Record = {}
    if mark.is_file():
        earlier = json.loads(mark.read_text(encoding="utf-8"))
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} holds something that is no training of hasten's: choose another folder")
    if overwrite and write and earlier:
        shutil.rmtree(output)
        earlier = {}
    differing = [] if overwrite else [key for key in settings if key in earlier and earlier[key] != settings[key]]
    if differing:
        changes = ", ".join(f"{key} was {earlier[key]}, is {settings[key]}" for key in differing)
        raise UserError(
            f"output={output} holds a training with other settings ({changes}): overwrite=true starts again"
        )
    if write:
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_whole(mark, lambda temporary: temporary.write_text(json.dumps(earlier | settings, indent=1)))


def _tokens(config: PretrainConfig, state: Path, root: Path, train_files: list[str]) -> tuple[Tokenizer, np.ndarray]:
    """Tokenizer, and the training text as one stream (N,) uint16; both are saved in state for resumed runs."""
    folder, stream_file = state / "tokenizer", state / "tokens.npy"
    # The stream is written last: if it exists, the tokenizer is complete.
    if stream_file.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder), np.load(stream_file)
    _LOG.info("training the tokenizer")
    tokenizer = train_tokenizer(read_texts(root, train_files), config.vocab_size)
    if len(tokenizer) != config.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is too large for the text: it gives {len(tokenizer)} entries")
    tokenizer.save_pretrained(folder)
    stream = encode_documents(tokenizer, read_texts(root, train_files))
    temporary = state / "tokens.tmp.npy"
    np.save(temporary, stream)
    os.replace(temporary, stream_file)
    return tokenizer, stream


def _shape(training: Training) -> Shape:
    return Shape(
        hidden_size=training.hidden_size,
        intermediate_size=training.intermediate_size,
        num_hidden_layers=training.depths[-1][0],
        num_attention_heads=training.heads,
        num_key_value_heads=training.kv_heads,
        head_dim=training.head_dim,
    )


def _schedule(training: Training, seed: int) -> Schedule:
    return Schedule(
        depths=tuple((layers, tokens) for layers, tokens in training.depths),
        batch=training.batch,
        sequence=training.sequence_length,
        lr=training.lr,
        embedding_lr=training.embedding_lr,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        decay=training.decay,
        seed=seed,
    )


def _train(
    model: str,
    config: PretrainConfig,
    state: Path,
    run_dir: Path,
    tokenizer: Tokenizer,
    stream: np.ndarray,
    tracker: Tracker,
) -> dict[str, Tensor]:
    """Weights of the trained model by name; resumes a stopped training."""
    training: Training = getattr(config, model)
    schedule = _schedule(training, config.seed)
    if len(stream) < 2 * training.sequence_length:
        raise UserError(
            f"{model}.sequence_length={training.sequence_length} is too long for {len(stream)} tokens of text"
        )
    state_path = state / f"{model}.pt"
    done = _steps(state_path)
    if done < schedule.steps:
        # With a rendezvous file of a killed run, the processes would wait for each other forever.
        state_path.with_suffix(".rendezvous").unlink(missing_ok=True)
        arguments = {
            "stream": stream,
            "vocab_size": config.vocab_size,
            "shape": _shape(training),
            "schedule": schedule,
            "state_path": state_path,
        }
        log_path = run_dir / f"{model}.log"
        with _watched(model, log_path, done, schedule.steps, tracker):
            train_in_processes(config.workers, config.threads, arguments, log_path)
    weights: dict[str, Tensor] = torch.load(state_path, weights_only=True)["model"]
    return weights


def _steps(state_path: Path) -> int:
    """Finished steps in the training state, 0 if there is none."""
    return int(torch.load(state_path, weights_only=True, mmap=True)["step"]) if state_path.exists() else 0


@contextmanager
def _watched(model: str, log_path: Path, done: int, total: int, tracker: Tracker) -> Iterator[None]:
    """Progress bar and tracked loss from the log that the training processes write."""
    finished = threading.Event()
    log_path.touch()

    def watch(progress: Progress) -> None:
        with log_path.open(encoding="utf-8") as log:
            ended = False
            unread = ""
            while not ended:
                ended = finished.wait(_POLL_SECONDS)
                *lines, unread = (unread + log.read()).split("\n")
                for line in lines:
                    step, tokens, loss, _ = line.split()
                    tracker.metrics({f"{model}.loss": float(loss), f"{model}.tokens": int(tokens)}, int(step))
                    progress.update(int(step), f"loss {loss}")

    with Progress(f"training the {model}", total, "step") as progress:
        progress.begin(done)
        thread = threading.Thread(target=watch, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()
        progress.update(total)


def _save(model: str, config: PretrainConfig, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> Path:
    """Folder of the checkpoint, written in bfloat16 and renamed into place."""
    training: Training = getattr(config, model)
    built = build(_shape(training), training.depths[-1][0], config.vocab_size)
    built.load_state_dict(weights)
    folder = Path(config.output) / model
    temporary = folder.with_name(f"{model}.tmp")
    for stale in (temporary, folder):
        shutil.rmtree(stale, ignore_errors=True)
    built.bfloat16().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)
    return folder


def _measure(
    model: str,
    config: PretrainConfig,
    folder: Path,
    root: Path,
    held_out: list[str],
    tokenizer: Tokenizer,
) -> Record:
    """Metrics of a saved checkpoint, read back: size, tokens seen, bits per byte of the held-out files.

    Bits per byte are those of the library's modules, of its tests, and of both together.
    """
    training: Training = getattr(config, model)
    saved: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(config.threads * config.workers)
    facts: Record = {
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "tokens": _schedule(training, config.seed).steps * training.batch * training.sequence_length,
    }
    length = training.sequence_length
    bits, size = 0.0, 0
    for part, names in _parts(held_out).items():
        texts = list(read_texts(root, names))
        part_bytes = sum(len(text.encode()) for text in texts)
        if part_bytes:
            _LOG.info("measuring the %s on %d held-out files (%s)", model, len(texts), part)
            facts[f"bits_per_byte_{part}"] = bits_per_byte(saved, tokenizer, texts, length, max(1, length // 2))
            bits += facts[f"bits_per_byte_{part}"] * part_bytes
            size += part_bytes
    facts |= {"bits_per_byte": bits / size if size else None, "held_out_bytes": size}
    return facts


def _parts(names: list[str]) -> dict[str, list[str]]:
    """Files of the library's own modules and of its tests."""
    parts: dict[str, list[str]] = {"library": [], "tests": []}
    for name in names:
        parts["library" if _TEST_FOLDERS.isdisjoint(name.split("/")[:-1]) else "tests"].append(name)
    return parts
