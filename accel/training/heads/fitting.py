"""The training loop that heads share: AdamW over shuffled examples, with a warm-up and a cosine decay."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.accel.errors import check_fields
from hasten.accel.training.schedules import Cosine


@dataclass(frozen=True)
class Fitting:
    """Hyper-parameters. batch: examples in a step. warmup: share of all steps in which the learning rate rises."""

    epochs: int
    lr: float
    batch: int
    weight_decay: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("epochs", self.epochs >= 1, "1 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("batch", self.batch >= 1, "1 or more"),
            ("warmup", 0 <= self.warmup <= 1, "from 0 to 1"),
        )

    def steps(self, examples: int) -> int:
        """Total number of optimizer steps for this number of examples."""
        return self.epochs * math.ceil(examples / self.batch)

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rate at a step, counted from 0, of `steps` in all."""
        return Cosine(self.warmup).rate(step, steps)

    def run(
        self,
        network: nn.Module,
        examples: Sequence[Tensor],
        loss: Callable[..., Tensor],
        seed: int,
        device: str,
        report: Callable[[int, float], None],
    ) -> None:
        """Train the network in place, and leave it on the device.

        examples: tensors with a row for each example. loss: called with the same rows of each tensor, returns a scalar.
        report(step, loss) is called after every step.
        """
        generator = torch.Generator().manual_seed(seed)
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        count = len(examples[0])
        steps, step = self.steps(count), 0
        for _ in range(self.epochs):
            for rows in torch.randperm(count, generator=generator).split(self.batch):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * self.rate(step, steps)
                value = loss(*(tensor[rows].to(device) for tensor in examples))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                step += 1
                report(step, value.item())
