"""The recall variant of a target: fine-tuned in this process on the tasks that `hasten cache` measures."""

import shutil
from os import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.accel.cache.full import Full
from hasten.accel.cache.measure import CacheMeasurement
from hasten.accel.data.library import read_texts
from hasten.accel.errors import UserError
from hasten.accel.evaluation import recall as tasks
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.pretraining import bits_per_byte
from hasten.accel.training.recall import RecallSchedule, train
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.tokenizer import load_tokenizer
from hasten.jobs.pretrain.model_card import recall_card
from hasten.jobs.pretrain.options import PretrainConfig, RecallTraining

_FILE = "model.safetensors"
# Windows of held-out text, as those of the models that are trained from nothing.
_WINDOW = 512
# The shortest context with room for a question of every task.
_SHORTEST = 48


def check(config: RecallTraining) -> None:
    """UserError for wrong stages or contexts, and for a base that is no Llama."""
    stages = config.stages

    def valid(sequence: int, exercise: int, steps: int, positions: int | None = None) -> bool:
        skips = positions is None or positions >= sequence
        return _SHORTEST <= exercise <= sequence <= config.batch and steps >= 1 and skips

    if not stages or not all(len(stage) in (3, 4) and valid(*stage) for stage in stages):
        raise UserError(
            f"recall.stages={stages} is wrong: expected stages [tokens of a sequence, of an exercise, steps] or with "
            f"positions as a fourth number, an exercise {_SHORTEST} or more, no longer than its sequence, and that no "
            "longer than recall.batch and the positions"
        )
    if not config.contexts or min(config.contexts) < _SHORTEST:
        raise UserError(f"recall.contexts={config.contexts} is wrong: expected lengths of {_SHORTEST} or more")
    base = AutoConfig.from_pretrained(resolve(config.base, weights=False))
    if base.model_type != "llama":
        raise UserError(f"recall.base={config.base} is a {base.model_type}: expected a llama")
    # Questions and answers follow the contexts.
    spread = [positions for *_, positions in stages_of(config)]
    longest = max(*spread, *(context + 128 for context in config.contexts))
    if longest > base.max_position_embeddings:
        raise UserError(
            f"recall.stages={stages} and recall.contexts={config.contexts} need {longest} positions: recall.base="
            f"{config.base} has {base.max_position_embeddings}"
        )


def stages_of(config: RecallTraining) -> tuple[tuple[int, int, int, int], ...]:
    """See RecallSchedule."""
    return tuple((stage[0], stage[1], stage[2], stage[3] if len(stage) == 4 else stage[0]) for stage in config.stages)


def schedule_of(config: RecallTraining, seed: int) -> RecallSchedule:
    """The schedule of a training."""
    return RecallSchedule(
        stages=stages_of(config),
        batch=config.batch,
        lr=config.lr,
        norm_lr=config.norm_lr,
        weight_decay=config.weight_decay,
        text_weight=config.text_weight,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        seed=seed,
    )


def fine_tune(
    config: PretrainConfig, root: Path, train_files: list[str], held_out: list[str], tracker: Tracker
) -> Record:
    """Train the variant, or resume; write its checkpoint; returns its metrics. root: folder of the files of text."""
    own = config.recall
    base = resolve(own.base)
    tokenizer = load_tokenizer(base, None)
    if tokenizer is None:
        raise UserError(f"recall.base={own.base} has no tokenizer, which recall tasks need")
    schedule = schedule_of(own, config.seed)
    torch.set_num_threads(config.workers * config.threads)
    shape = AutoConfig.from_pretrained(base)
    if own.rope_theta is not None:
        shape.rope_parameters["rope_theta"] = own.rope_theta
    model: Any = AutoModelForCausalLM.from_pretrained(base, config=shape, dtype=torch.float32)
    lines = [line for text in read_texts(root, train_files) for line in text.splitlines(keepends=True)]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    state = Path(config.output) / "state" / "recall.pt"
    with Progress("training the recall variant", schedule.steps, "step") as progress:

        def report(step: int, loss: float, right: float) -> None:
            tracker.metrics({"recall.loss": loss, "recall.right": right}, step)
            progress.update(step, f"loss {loss:.3f}, {right:.0%} of the answers' tokens right")

        train(model, encode, lines, schedule, state, report)
    folder = Path(config.output) / "recall"
    temporary = folder.with_name("recall.tmp")
    for stale in (temporary, folder):
        shutil.rmtree(stale, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # As it was stored.
    saved: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
    texts = list(read_texts(root, held_out))
    facts = _recall(own, saved, encode, "".join(texts), config.seed)
    facts |= {
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "bytes": (temporary / _FILE).stat().st_size,
        "steps": schedule.steps,
        "tokens": schedule.steps * schedule.batch,
        "bits_per_byte": bits_per_byte(saved, tokenizer, texts, _WINDOW, _WINDOW // 2),
    }
    (temporary / "README.md").write_text(recall_card(facts, config), encoding="utf-8")
    replace(temporary, folder)
    return facts


def _recall(config: RecallTraining, model: Any, encode: tasks.Encode, text: str, seed: int) -> Record:
    """Recall with the full cache by task and context, on held-out text and other seeds than in training."""
    facts: Record = {}
    measurement = CacheMeasurement(model, Full(), None)
    for context in config.contexts:
        for task in tasks.TASKS:
            samples = tasks.samples(task, encode, text, context, config.samples, seed)
            facts[f"{task}_{context}"] = measurement.recall(samples)[0]
    return facts
