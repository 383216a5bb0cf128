"""Trains a draft head in one process: AdamW with warm-up, gradient accumulation and clipping, over packed windows.

The batch of a step, and the random numbers of its loss, depend on the seed and the number of the step alone. So a
training that resumes from a checkpoint has the loss curve of one that was never interrupted. The loss of a step is the
mean over its micro-batches, of which each is a mean over predicted tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.accel.errors import UserError, check_fields
from hasten.accel.outputs.resumable import write_whole
from hasten.accel.training.data.windows import PackedWindows
from hasten.accel.training.division import WHOLE, Division
from hasten.accel.training.heads.draft_head import DraftHead, DraftNetwork, HeadBatch, Loss
from hasten.accel.training.schedules import Cosine, Schedule, decayed

STATE = "state.pt"


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters. steps: of the whole training. batch: windows of a step.

    micro_batch: windows that run at once. clip: largest norm of the gradient; 0 does not clip. bfloat16: products in
    bfloat16, with weights and optimizer in float32.
    """

    steps: int
    batch: int = 8
    micro_batch: int = 8
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Schedule = field(default_factory=Cosine)
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("steps", self.steps >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("micro_batch", 1 <= self.micro_batch <= self.batch, f"from 1 to batch={self.batch}"),
            ("lr", self.lr > 0, "above 0"),
            ("clip", self.clip >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        )
        if self.batch % self.micro_batch:
            raise UserError(f"micro_batch={self.micro_batch} must divide batch={self.batch}")

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a step."""
        return self.batch // self.micro_batch

    def rate(self, step: int, decay_from: int | None = None, decay_steps: int = 1) -> float:
        """Learning rate at a step, counted from 0. decay_from: step at which a decay of its own begins."""
        if decay_from is None:
            return self.lr * self.schedule.rate(step, self.steps)
        begun = self.schedule.rate(decay_from, self.steps)
        return self.lr * begun * decayed(step - decay_from, decay_steps)


class Trainer:
    """The training of a network in this process; `network` is trained in place, on its device."""

    def __init__(self, head: DraftHead, network: DraftNetwork, windows: PackedWindows, settings: TrainSettings) -> None:
        self.head, self.network, self.settings = head, network, settings
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._device = parameters[0].device
        self._optimizer = adamw(parameters, settings)
        self._parameters = parameters
        self._windows = windows
        self.step = 0

    def train(self, count: int, decay_from: int | None = None, decay_steps: int = 1) -> "list[dict[str, float]]":
        """Do `count` steps; the loss of each, its parts, and the norm of its gradient, in order."""
        self.network.train()
        return [self._step(decay_from, decay_steps) for _ in range(count)]

    def _step(self, decay_from: int | None, decay_steps: int) -> dict[str, float]:
        rate = self.settings.rate(self.step, decay_from, decay_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for seed, batch in micro_batches(self._windows, self.settings, self.step, self._device):
            loss = loss_of(self.head, self.network, batch, seed, self.settings.bfloat16)
            (loss.value / self.settings.micro_batches).backward()
            losses.append(loss)
        means = mean_of(losses)
        check_finite(self.step, means["loss"])
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip or torch.inf)
        self._optimizer.step()
        self.step += 1
        return {**means, "gradient_norm": float(norm), "lr": rate}

    def weights(self) -> dict[str, Tensor]:
        """The network's tensors by name, float32 on the CPU."""
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.network.state_dict().items()}

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return state_bytes(self._optimizer)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}
        needed = sum(3 * parameter.numel() * 4 for parameter in self._parameters)
        write_whole(folder / STATE, lambda temporary: torch.save(state, temporary), needed)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(folder / STATE, map_location=self._device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state in this process."""
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def adamw(parameters: Sequence[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """The optimizer of these parameters."""
    return torch.optim.AdamW(parameters, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=True)


def micro_batches(
    windows: PackedWindows,
    settings: TrainSettings,
    step: int,
    device: torch.device,
    division: Division = WHOLE,
) -> Iterator[tuple[int, HeadBatch]]:
    """Seed of the loss, and this process' part with features in float32, of every micro-batch of a step."""
    size = settings.micro_batch
    numbers = windows.order(step, settings.batch)
    for index in range(settings.micro_batches):
        batch = windows.batch(division.part(numbers[index * size : (index + 1) * size])).to(device)
        seed = (settings.seed * settings.steps + step) * settings.micro_batches + index
        yield seed, replace(batch, features=batch.features.float())


def loss_of(head: DraftHead, network: DraftNetwork, batch: HeadBatch, seed: int, bfloat16: bool = False) -> Loss:
    """The loss of a micro-batch, whose random numbers depend on the seed alone."""
    torch.manual_seed(seed)
    device = batch.tokens.device.type
    with torch.autocast(device, torch.bfloat16) if bfloat16 else nullcontext():
        return head.loss(network, batch)


def mean_of(losses: Sequence[Loss]) -> dict[str, float]:
    """Mean of the losses and of their parts."""
    value = sum(float(loss.value.detach()) for loss in losses) / len(losses)
    parts: Mapping[str, Tensor] = losses[0].parts
    return {"loss": value, **{name: sum(float(loss.parts[name]) for loss in losses) / len(losses) for name in parts}}


def check_finite(step: int, loss: float) -> None:
    """UserError for a loss that is no number."""
    if not math.isfinite(loss):
        raise UserError(f"the loss of step {step} is {loss}: give a smaller train.lr")
