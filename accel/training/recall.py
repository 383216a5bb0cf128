"""Fine-tuning of a small model on recall tasks: contexts that hold answers, each with as many questions as fit.

Exercises get longer from stage to stage; a sequence holds as many of them as fit, and their positions are its own. Some
of them are text without questions, and text inside of contexts is predicted, too, so that the model keeps what it knew.
The embedding is not trained.

Sequences of some stages skip positions in one to three places, so that the model learns distances between tokens beyond
the sequence's length from as many answers as short exercises have.
Source: Zhu et al. 2023, arXiv:2309.10400 (PoSE), which skips in one place.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from hasten.accel.evaluation.recall import TASKS, Encode
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.muon import Muon

TEXT = "text"
# How often each task is trained. The questions of `multi_turn` are those of `keys`.
_SHARES = {"keys": 0.32, "joint": 0.32, "needle": 0.1, "repeated": 0.16, TEXT: 0.1}
# Tasks whose contexts are text that can be predicted.
_TEXTUAL = ("needle", "repeated")
# Questions of a context; those that do not fit are left out.
_TURNS = {"needle": 8}
_MOST_TURNS = 24
# Consecutive lines of text that fill a context.
_LINES = 2000
# Places in which a sequence skips positions, at most, and the share of sequences that skip none.
_MOST_SKIPS = 3
_UNSKIPPED = 0.25
# Share of a sequence's tokens whose predictions are made: answers first, then text.
_READ = 4
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class RecallSchedule:
    """Stages, batch size and learning rates.

    stages: (tokens of a sequence, tokens of an exercise, steps, positions) each. Of more positions than tokens, some
    are skipped. batch: tokens of a step. text_weight: of the mean loss on text; that on answers has 1. decay: share of
    all steps, at the end, in which the rates fall to zero.
    """

    stages: tuple[tuple[int, int, int, int], ...]
    batch: int = 4096
    lr: float = 2e-3
    norm_lr: float = 1e-3
    weight_decay: float = 0.01
    text_weight: float = 0.3
    warmup_steps: int = 20
    decay: float = 0.4
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(stage[2] for stage in self.stages)

    def lengths(self, step: int) -> tuple[int, int, int]:
        """Tokens of the sequences and of the exercises of a step, and positions of the sequences."""
        for sequence, exercise, steps, positions in self.stages:
            if step < steps:
                return sequence, exercise, positions
            step -= steps
        raise ValueError(f"there are only {self.steps} steps")

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step: linear warm-up, constant, linear decay to zero."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, left)


@dataclass(frozen=True)
class Batch:
    """ids, positions: (N, T). read: (K,) indices into the N * T tokens. targets, weights: (K,). answers: (K,) bool."""

    ids: Tensor
    positions: Tensor
    read: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor


def exercise(
    task: str, encode: Encode, lines: Sequence[str], length: int, generator: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids of at most `length`, and for each token: 2 in an answer, 1 in text, 0 elsewhere."""
    first = generator.randrange(max(1, len(lines) - _LINES))
    filler = lines[first : first + _LINES]
    if task == TEXT:
        ids = encode("".join(filler[: 1 + length // 4]))[:length]
        return ids, [1] * len(ids)
    make, _ = TASKS[task]
    room = min(length // 2, 256)
    sample = make(encode, filler, length - room, generator, _TURNS.get(task, _MOST_TURNS))
    ids, kinds = list(sample.context), [int(task in _TEXTUAL)] * len(sample.context)
    for turn in sample.turns:
        if len(ids) + len(turn.question) + len(turn.answer) > length:
            break
        ids += [*turn.question, *turn.answer]
        kinds += [0] * len(turn.question) + [2] * len(turn.answer)
    return ids[:length], kinds[:length]


def batch_of(encode: Encode, lines: Sequence[str], schedule: RecallSchedule, step: int) -> Batch:
    """The exercises of a step, which depend on nothing but the seed and the step."""
    generator = random.Random(f"train {schedule.seed} {step}")
    width, length, positions = schedule.lengths(step)
    rows = max(1, schedule.batch // width)
    tasks, shares = zip(*_SHARES.items(), strict=True)
    ids, kinds = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
    for row in range(rows):
        filled = 0
        while width - filled >= length // 2:
            (task,) = generator.choices(tasks, shares)
            own, own_kinds = exercise(task, encode, lines, min(length, width - filled), generator)
            ids[row, filled : filled + len(own)] = torch.tensor(own)
            kinds[row, filled : filled + len(own)] = torch.tensor(own_kinds)
            filled += max(1, len(own))
    kinds[:, 0] = 0
    count = rows * width // _READ
    flat = kinds.flatten()
    answers, text = (flat == 2).nonzero()[:, 0], (flat == 1).nonzero()[:, 0]
    text = text[torch.tensor(generator.sample(range(len(text)), len(text)), dtype=torch.int64)]
    chosen = torch.cat([answers, text, (flat == 0).nonzero()[:, 0]])[:count]
    is_answer, is_text = flat[chosen] == 2, flat[chosen] == 1
    weights = is_answer / is_answer.sum().clamp(min=1) + schedule.text_weight * is_text / is_text.sum().clamp(min=1)
    places = torch.stack([skipping(width, positions, generator) for _ in range(rows)])
    return Batch(ids, places, chosen - 1, ids.flatten()[chosen], weights, is_answer)


def skipping(width: int, positions: int, generator: random.Random) -> Tensor:
    """Ascending positions (width,) below `positions`, without those that are skipped in some places."""
    ascending = torch.arange(width)
    if positions <= width or generator.random() < _UNSKIPPED:
        return ascending
    for _ in range(generator.randint(1, _MOST_SKIPS)):
        room = positions - 1 - int(ascending[-1])
        ascending[generator.randrange(1, width) :] += generator.randint(0, room)
    return ascending


def recall_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of a batch, and the share of answers' tokens that are the most probable ones."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.device.type == "cpu"):
        hidden = model.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[batch.read])
    loss = (F.cross_entropy(logits.float(), batch.targets, reduction="none") * batch.weights).sum()
    with torch.no_grad():
        right = ((logits.argmax(-1) == batch.targets) & batch.answers).sum() / batch.answers.sum().clamp(min=1)
    return loss, right


def train(
    model: LlamaForCausalLM,
    encode: Encode,
    lines: Sequence[str],
    schedule: RecallSchedule,
    state_path: Path,
    report: Callable[[int, float, float], None] | None = None,
    save_every: int = 25,
) -> LlamaForCausalLM:
    """Fine-tune the model in place; returns it. lines: of text.

    The state is saved to state_path every save_every steps and read from there at the start, so that a killed training
    resumes. report(step, loss, share of answers' tokens that are right) is called after every step.
    """
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon([p for p in trained if p.ndim == 2], schedule.lr, weight_decay=schedule.weight_decay), schedule.lr),
        (
            torch.optim.AdamW([p for p in trained if p.ndim < 2], schedule.norm_lr, _BETAS, weight_decay=0.0),
            schedule.norm_lr,
        ),
    ]
    done = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        done = int(state["step"])
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    for step in range(done, schedule.steps):
        batch = batch_of(encode, lines, schedule, step)
        loss, right = recall_loss(model, batch)
        loss.backward()
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule.rate(step)
            # Muon's products may be in bfloat16: they only bring singular values near 1.
            with torch.autocast("cpu", torch.bfloat16, enabled=model.device.type == "cpu"):
                optimizer.step()
            optimizer.zero_grad()
        if report:
            report(step + 1, loss.item(), right.item())
        if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
            _save(state_path, step + 1, model, [optimizer for optimizer, _ in optimizers])
    return model


def _save(path: Path, step: int, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
    write_whole(path, lambda temporary: torch.save(state, temporary))
