"""The interface of heads: a head is a small network on the hidden states of a model, which a drafter uses.

A head is a frozen dataclass of the hyper-parameters of its network and its training. It defines how examples are
collected, the loss, the quality measures on held-out text, and the file format. To add a head, write a module with its
network and its training, and a file in conf/head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.accel.errors import UserError

if TYPE_CHECKING:
    from hasten.accel.training.heads.draft_head import DraftHead

ExamplesT = TypeVar("ExamplesT", bound=Sized)
NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class HeadModels:
    """Causal LMs with one vocabulary on one device. draft: None if the head needs no draft model."""

    target: PreTrainedModel
    draft: PreTrainedModel | None = None


class HeadQuality(ABC):
    """Quality of a trained head on held-out examples."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers by name; `loss` is the objective of the training."""

    def tables(self) -> Mapping[str, Sequence[Mapping[str, float]]]:
        """Tables by name, as rows; they are copied into the report."""
        return {}

    @abstractmethod
    def summary(self) -> list[str]:
        """Lines of text to print."""


class Head(ABC, Generic[ExamplesT, NetworkT]):
    """A head and its training.

    drafter: name in conf/drafter of the drafter that uses the head; its hyper-parameter `head` is the file's path.
    file: default name of the file. needs_draft_model: whether examples are made with the draft model, or with the
    target alone. reads: the model whose hidden states the network reads; a file is valid for this model only. epochs:
    passes over all examples.
    """

    drafter: ClassVar[str]
    file: ClassVar[str]
    needs_draft_model: ClassVar[bool] = True
    reads: ClassVar[Literal["target", "draft"]] = "draft"
    epochs: int

    @abstractmethod
    def parameters(self, hidden_size: int) -> int:
        """Number of parameters of the network for a model with this hidden size."""

    def on_records(self, draft: Path | None) -> "DraftHead":
        """The head as the trainer trains it on the target's records; UserError if it cannot. draft: the draft model."""
        raise UserError(f"head={type(self).__name__} is trained by hasten train_drafter")

    @property
    def examples_per_token(self) -> float:
        """Share of the tokens of a text that become examples."""
        return 1.0

    @abstractmethod
    def collect(
        self,
        models: HeadModels,
        tokens: Tensor,
        generator: torch.Generator,
        batch: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ExamplesT:
        """Examples in CPU memory from windows tokens (S, T) int64.

        The generator must be on the models' device. batch: windows in a forward pass. progress: called with the number
        of finished windows.
        """

    @abstractmethod
    def steps(self, examples: int) -> int:
        """Total number of optimizer steps for this number of examples."""

    @abstractmethod
    def fit(
        self,
        examples: ExamplesT,
        seed: int = 0,
        device: str = "cpu",
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> NetworkT:
        """The trained network, in float32 on the CPU; report(step, loss) is called after every step, counted from 1."""

    @abstractmethod
    def measure(self, network: NetworkT, examples: ExamplesT) -> HeadQuality:
        """Quality of the network on held-out examples."""

    @abstractmethod
    def save(self, network: NetworkT, path: Path, fingerprint: str = "") -> None:
        """Write the file atomically. fingerprint: of the checkpoint that `reads` names; empty if unknown."""

    @abstractmethod
    def load(self, path: Path, fingerprint: str = "") -> NetworkT:
        """The network of a file, in float32; UserError if it is no such file, or is for another fingerprint."""
